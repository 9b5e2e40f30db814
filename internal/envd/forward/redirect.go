package forward

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// preferredPort is where redirected connections arrive, next to the agent's.
// Any other does, but one that is known can be avoided.
const preferredPort = 49984

// redirect exposes by rules that turn connections to the addresses to a port of
// the forwarder's own. It binds none of the sandbox's ports, so it is in
// nobody's way, and an address that is redirected a moment too long does no harm.
type redirect struct {
	loops     sync.WaitGroup
	listeners []*net.TCPListener
	port      uint16
	rules     rules
}

// rules are the kernel's for what is redirected.
type rules interface {
	// set redirects connections to exactly these addresses, as far as the rules
	// are for their family. After an error it is to be called again.
	set(want map[netip.AddrPort]bool) error
	// intact says whether the rules are as they were set.
	intact() bool
	close()
}

// newRedirect installs rules for connections that arrive at networks, tcp4 and
// tcp6 or one of them.
func newRedirect(ctx context.Context, serve server, install func(port uint16) (rules, error), networks ...string) (*redirect, error) {
	r := new(redirect)
	err := r.listen(ctx, networks)
	if err == nil {
		r.rules, err = install(r.port)
	}
	if err != nil {
		r.stop()
		return nil, err
	}
	for _, l := range r.listeners {
		r.loops.Go(func() {
			accept(ctx, l, func(c *net.TCPConn) {
				to, err := originalDestination(c)
				if err != nil || to.Port() == r.port { // it came here directly
					reset(c)
					return
				}
				serve(ctx, c, to, true)
			})
		})
	}
	return r, nil
}

// listen opens the port at which redirected connections arrive, the same in all
// networks that there are.
func (r *redirect) listen(ctx context.Context, networks []string) error {
	var config net.ListenConfig
	for _, network := range networks {
		port := r.port
		if port == 0 {
			port = preferredPort
		}
		l, err := config.Listen(ctx, network, ":"+strconv.Itoa(int(port)))
		switch {
		case errors.Is(err, unix.EADDRINUSE) && r.port == 0:
			l, err = config.Listen(ctx, network, ":0")
		case errors.Is(err, unix.EAFNOSUPPORT) && r.port != 0:
			continue
		}
		if err != nil {
			return fmt.Errorf("listen for redirected connections: %w", err)
		}
		r.listeners = append(r.listeners, l.(*net.TCPListener))
		r.port = uint16(l.Addr().(*net.TCPAddr).Port)
	}
	return nil
}

func (r *redirect) expose(paths map[netip.AddrPort]netip.AddrPort) (done bool, err error) {
	want := make(map[netip.AddrPort]bool, len(paths))
	for at := range paths {
		want[netip.AddrPortFrom(at.Addr().WithZone(""), at.Port())] = true
	}
	err = r.rules.set(want)
	return err == nil, err
}

func (r *redirect) intact() bool { return r.rules.intact() }

// own is empty: the forwarder's port is on all addresses, and no path leads there.
func (r *redirect) own() []netip.AddrPort { return nil }

func (r *redirect) stop() {
	for _, l := range r.listeners {
		l.Close()
	}
	r.loops.Wait()
}

func (r *redirect) close() { r.rules.close() }

// originalDestination tells where a redirected connection was meant to go.
func originalDestination(c *net.TCPConn) (netip.AddrPort, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return netip.AddrPort{}, err
	}
	const soOriginalDst = 80 // for both families
	four := c.LocalAddr().(*net.TCPAddr).IP.To4() != nil
	var to netip.AddrPort
	var failed error
	err = raw.Control(func(fd uintptr) {
		// The answer is a socket address. The package has no call for this option,
		// but calls for others that are long enough and start with what is needed.
		if four { // struct sockaddr_in: family, port, address
			var raw *unix.IPv6Mreq
			if raw, failed = unix.GetsockoptIPv6Mreq(int(fd), unix.SOL_IP, soOriginalDst); failed == nil {
				answer := raw.Multiaddr
				to = netip.AddrPortFrom(netip.AddrFrom4([4]byte(answer[4:8])), binary.BigEndian.Uint16(answer[2:4]))
			}
			return
		}
		var raw *unix.IPv6MTUInfo // starts with a struct sockaddr_in6
		if raw, failed = unix.GetsockoptIPv6MTUInfo(int(fd), unix.SOL_IPV6, soOriginalDst); failed == nil {
			port := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, raw.Addr.Port))
			to = netip.AddrPortFrom(netip.AddrFrom16(raw.Addr.Addr), port)
		}
	})
	return to, errors.Join(err, failed)
}
