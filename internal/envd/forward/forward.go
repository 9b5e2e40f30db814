// Package forward makes what listens on a loopback address inside the sandbox
// reachable from outside: whoever connects to one of the machine's other
// addresses at that port is connected to the listener. A listener of the
// sandbox's own on such an address always goes before.
package forward

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

const (
	// interval between two looks at what listens. Together with what a look and
	// its consequences take it has to stay below 100 ms.
	interval = 75 * time.Millisecond
	// restPerSocket stretches the interval where many sockets have to be looked at
	// to find those that listen, which bounds the looking's share of a processor:
	// gVisor shows listeners only together with all connections.
	restPerSocket = 50 * time.Microsecond
	// quietInterval takes the interval's place where looking is costly and nothing
	// points to a change: being woken twenty times a second is what costs in gVisor.
	// Somebody who asks for a port points to it, where packets can be watched.
	quietInterval     = 5 * time.Second
	unwatchedInterval = time.Second
	// changeAlert is how long after a change another one is likely.
	changeAlert = time.Second
	// addressLife is how long the machine's addresses are taken for unchanged.
	addressLife = 5 * time.Second
	// maxConnections at once; further ones wait to be accepted.
	maxConnections = 4096
	dialTimeout    = 30 * time.Second
)

// Config of a Forwarder.
type Config struct {
	Log *slog.Logger
	// Idle says that nothing can be listening because nothing runs. The
	// forwarder then rests until it is woken. Nil if that cannot be told.
	Idle func() bool
}

// Forwarder finds listeners on loopback addresses and forwards connections to
// them. Make one with New.
type Forwarder struct {
	config Config
	wake   chan struct{}
	alert  atomic.Int64 // until when a change is likely, Unix nanoseconds
	slots  chan struct{}
	serves sync.WaitGroup

	reserved  uint16
	quiet     time.Duration // 0: the interval is always the same
	open      func() (sockets, error)
	expose    func(context.Context) (exposer, error)
	sockets   sockets
	exposer   exposer
	listeners []listener
	addrsRead time.Time // zero if not all is forwarded that should be

	mu    sync.Mutex
	paths map[netip.AddrPort]netip.AddrPort // from outside address to loopback address
}

// New returns a forwarder that does nothing before Run.
func New(c Config) *Forwarder {
	f := &Forwarder{config: c, wake: make(chan struct{}, 1), slots: make(chan struct{}, maxConnections)}
	f.open = openSockets
	f.expose = f.redirect
	return f
}

// redirect returns the exposer for Linux, or else that for gVisor.
func (f *Forwarder) redirect(ctx context.Context) (exposer, error) {
	nft := func(port uint16) (rules, error) { return newNFT(port, f.config.Log) }
	r, err := newRedirect(ctx, f.serve, nft, "tcp4", "tcp6")
	if err == nil {
		return r, nil
	}
	r, errLegacy := newRedirect(ctx, f.serve, newIPTables, "tcp4")
	if errLegacy == nil {
		return r, nil
	}
	return nil, errors.Join(err, errLegacy)
}

// Wake says that during the time to come something may well begin to listen: a
// program is about to run, or runs.
func (f *Forwarder) Wake(during time.Duration) {
	until := time.Now().Add(during).UnixNano()
	for {
		now := f.alert.Load()
		if until <= now || f.alert.CompareAndSwap(now, until) {
			break
		}
	}
	f.lookSoon()
}

// lookSoon makes a forwarder that rests look once.
func (f *Forwarder) lookSoon() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// Run forwards until ctx ends, but never the reserved port. It leaves nothing
// behind: no connection, listener or rule.
func (f *Forwarder) Run(ctx context.Context, reserved uint16) {
	f.reserved = reserved
	log := f.config.Log
	var err error
	if f.sockets, err = f.open(); err != nil {
		log.Warn("Listeners on loopback addresses are not forwarded", "error", err)
		return
	}
	defer f.sockets.close()
	ctx, cancel := context.WithCancel(ctx)
	if f.exposer, err = f.expose(ctx); err != nil {
		log.Info("Ports are forwarded by listening on them", "reason", err)
		f.exposer = newListening(ctx, f.serve)
	}
	defer f.exposer.close() // last, so that peers still hear of their connections' end
	defer f.serves.Wait()
	defer f.exposer.stop()
	defer cancel()

	if f.sockets.costly() {
		f.quiet = quietInterval
		if p, err := openPackets(); err == nil {
			f.serves.Go(func() { p.watch(ctx, f.lookSoon) })
		} else {
			log.Info("Listeners may be noticed late", "reason", err)
			f.quiet = unwatchedInterval
		}
	}

	failing := false
	for {
		seen, err := f.look()
		if err != nil && !failing {
			log.Warn("Cannot forward listeners on loopback addresses", "error", err)
		}
		failing = err != nil
		if !f.pause(ctx, seen, failing) {
			return
		}
	}
}

// pause waits until it is time for the next look; false says that ctx ended.
func (f *Forwarder) pause(ctx context.Context, seen int, failing bool) bool {
	looked := time.Now()
	rest := max(interval, time.Duration(seen)*restPerSocket)
	if failing {
		rest = max(rest, time.Second)
	}
	quiet := looked.UnixNano() >= f.alert.Load()
	going := true
	switch {
	case quiet && f.config.Idle != nil && len(f.paths) == 0 && f.config.Idle():
		going = wait(ctx, forever, f.wake)
	case quiet && f.quiet > 0:
		going = wait(ctx, max(f.quiet, rest), f.wake)
	}
	return going && wait(ctx, rest-time.Since(looked), nil)
}

const forever = time.Duration(math.MaxInt64)

// wait returns after a time or when woken; false says that ctx ended.
func wait(ctx context.Context, d time.Duration, woken <-chan struct{}) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
	case <-woken:
	}
	return true
}

// look brings what is forwarded in line with what listens. It tells how many
// sockets had to be looked at.
func (f *Forwarder) look() (seen int, err error) {
	now := time.Now()
	listeners, seen, err := f.sockets.listeners()
	if err != nil {
		return 0, err
	}
	listeners = without(listeners, f.exposer.own())
	if slices.Equal(listeners, f.listeners) && now.Sub(f.addrsRead) < addressLife && f.exposer.intact() {
		return seen, nil
	}
	if !slices.Equal(listeners, f.listeners) {
		f.Wake(changeAlert) // more of that, mostly
	}
	f.addrsRead = time.Time{}
	addrs, err := outsideAddrs()
	if err != nil {
		return seen, err
	}
	paths := plan(listeners, addrs, f.reserved)
	// The paths first: a connection that comes through a new one finds its way.
	f.mu.Lock()
	f.paths = paths
	f.mu.Unlock()
	done, err := f.exposer.expose(paths)
	if done && err == nil {
		f.listeners, f.addrsRead = listeners, now
	}
	return seen, err
}

// serve forwards one connection that was made to the address to.
func (f *Forwarder) serve(ctx context.Context, conn *net.TCPConn, to netip.AddrPort, fresh bool) {
	select {
	case f.slots <- struct{}{}:
	case <-ctx.Done():
		reset(conn)
		return
	}
	f.serves.Go(func() {
		defer func() { <-f.slots }()
		inner, err := f.dial(ctx, to, fresh)
		if err != nil {
			reset(conn)
			return
		}
		join(ctx, conn, inner)
	})
}

// dial connects to where connections to an outside address go.
func (f *Forwarder) dial(ctx context.Context, to netip.AddrPort, fresh bool) (*net.TCPConn, error) {
	dialer := net.Dialer{Timeout: dialTimeout, KeepAlive: -1}
	if fresh && f.sockets.costly() {
		// Rather than look for it: a listener of the sandbox's own answers.
		if own, err := dialer.DialContext(ctx, "tcp", to.String()); err == nil {
			f.lookSoon()
			return own.(*net.TCPConn), nil
		}
		fresh = false
	}
	path, err := f.path(to, fresh)
	if err != nil {
		return nil, err
	}
	inner, err := dialer.DialContext(ctx, "tcp", path.String())
	if err != nil {
		f.lookSoon() // the listener may be gone
		return nil, err
	}
	return inner.(*net.TCPConn), nil
}

var errNoListener = errors.New("nothing listens there")

// path tells where a connection to an outside address goes. With fresh it is
// made sure that this is so at this moment: what listened at the last look may
// be gone, and the sandbox may have come to listen on the outside address itself.
func (f *Forwarder) path(to netip.AddrPort, fresh bool) (netip.AddrPort, error) {
	if !fresh {
		f.mu.Lock()
		defer f.mu.Unlock()
		if path, ok := f.paths[to]; ok {
			return path, nil
		}
		return netip.AddrPort{}, errNoListener
	}
	listeners, _, err := f.sockets.listeners()
	if err != nil {
		return netip.AddrPort{}, err
	}
	listeners = slices.DeleteFunc(listeners, func(l listener) bool { return l.addr.Port() != to.Port() })
	if served(listeners, to) {
		return to, nil
	}
	if path, ok := plan(listeners, []netip.Addr{to.Addr()}, f.reserved)[to]; ok {
		return path, nil
	}
	return netip.AddrPort{}, errNoListener
}

// outsideAddrs lists the addresses at which the machine is reached.
func outsideAddrs() ([]netip.Addr, error) {
	links, err := net.Interfaces()
	if err != nil {
		return nil, fmt.Errorf("list links: %w", err)
	}
	var outside []netip.Addr
	for _, link := range links {
		if link.Flags&net.FlagUp == 0 || link.Flags&net.FlagLoopback != 0 {
			continue
		}
		addrs, err := link.Addrs()
		if err != nil {
			return nil, fmt.Errorf("list addresses of link %s: %w", link.Name, err)
		}
		for _, a := range addrs {
			ipnet, ok := a.(*net.IPNet)
			if !ok {
				continue
			}
			addr, ok := netip.AddrFromSlice(ipnet.IP)
			if !ok || addr.IsLoopback() {
				continue
			}
			if addr = addr.Unmap(); addr.Is6() && addr.IsLinkLocalUnicast() {
				addr = addr.WithZone(link.Name)
			}
			outside = append(outside, addr)
		}
	}
	return outside, nil
}
