package network

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// ErrNoFreeSlot says that every address of the range is taken.
var ErrNoFreeSlot = errors.New("no network slot is free: choose a larger range with --network-cidr")

// ErrClosed is returned by Acquire once the pool is closed.
var ErrClosed = errors.New("network pool is closed")

// rangeLock is held while a platform chooses its range.
const rangeLock = "/run/wrenn-network.lock"

// Pool makes slots, keeps some ready and knows which are in use. It is safe for
// concurrent use.
type Pool struct {
	cfg  Config
	log  *slog.Logger
	stop context.CancelFunc
	work sync.WaitGroup
	// ready holds prepared slots; want holds a token for each that is missing.
	ready chan *Slot
	want  chan struct{}

	mu     sync.Mutex
	slots  map[int]*entry // every slot that is on the host
	next   int            // where the search for a free index starts
	closed bool
}

// entry is what the pool knows of a slot that is on the host.
type entry struct {
	slot      *Slot
	inUse     bool       // given out or adopted; guarded by Pool.mu
	releasing sync.Mutex // held by who removes the slot
}

// Open takes over the slots that inUse names, removes every other of the tag,
// installs the host's table and starts to prepare slots. A slot of inUse that is
// not whole any more is removed too; Adopted tells.
func Open(ctx context.Context, cfg Config, inUse []int) (*Pool, error) {
	if err := checkTag(cfg.Tag); err != nil {
		return nil, err
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Deny == nil {
		cfg.Deny = DefaultDeny
	}
	for _, p := range cfg.Allow {
		if !p.Addr().Is4() {
			return nil, fmt.Errorf("allow network range %s: sandboxes have IPv4 only", p)
		}
	}
	if err := checkResolver(&cfg); err != nil {
		return nil, err
	}
	p := &Pool{
		cfg: cfg, log: cfg.Log,
		ready: make(chan *Slot, max(cfg.Ready, 0)),
		want:  make(chan struct{}, max(cfg.Ready, 0)),
		slots: map[int]*entry{},
	}
	if err := p.setUpHost(ctx, inUse); err != nil {
		return nil, fmt.Errorf("open network pool: %w", err)
	}
	run, stop := context.WithCancel(context.WithoutCancel(ctx))
	p.stop = stop
	for range cfg.Ready {
		p.want <- struct{}{}
	}
	p.work.Go(func() { p.refill(run) })
	return p, nil
}

func checkResolver(cfg *Config) error {
	if cfg.Resolver.IsValid() {
		cfg.Resolver = cfg.Resolver.Unmap()
		if !usableResolver(cfg.Resolver) {
			return fmt.Errorf("resolver %s: want an IPv4 address that is not the loopback", cfg.Resolver)
		}
		return nil
	}
	var ok bool
	cfg.Resolver, ok = hostResolver("/etc/resolv.conf", "/run/systemd/resolve/resolv.conf")
	if !ok {
		cfg.Log.Warn("the host names no nameserver that sandboxes can use: they have none",
			"remedy", "name one that is not the loopback in /etc/resolv.conf or in the configuration")
	}
	return nil
}

func (p *Pool) setUpHost(ctx context.Context, inUse []int) error {
	if err := shareNetNSDir(); err != nil {
		return err
	}
	if err := enableForwarding(); err != nil {
		return err
	}
	if err := p.takeRange(); err != nil {
		return err
	}
	if err := p.sweep(ctx, inUse); err != nil {
		return err
	}
	if err := installHostTable(p.cfg); err != nil {
		return err
	}
	if err := warnOfForwardDrop(p.cfg.Tag, p.log); err != nil {
		p.log.Warn("cannot see whether another firewall keeps sandboxes off the internet", "error", err)
	}
	return nil
}

// takeRange chooses the range and holds it, one platform of the host at a time:
// two that start at once must not choose the same.
func (p *Pool) takeRange() error {
	lock, err := os.OpenFile(rangeLock, os.O_RDWR|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("lock network ranges: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock network ranges: %w", err)
	}
	cidr, err := chooseCIDR(p.cfg.Tag, p.cfg.CIDR)
	if err != nil {
		return err
	}
	p.cfg.CIDR = cidr
	return holdRange(p.cfg.Tag, cidr)
}

// sweep adopts the slots of inUse and removes all others of the tag.
func (p *Pool) sweep(ctx context.Context, inUse []int) error {
	found, err := indexes(p.cfg.Tag)
	if err != nil {
		return err
	}
	for _, i := range found {
		if err := ctx.Err(); err != nil {
			return err
		}
		p.next = i + 1 // addresses used last are given out last
		if slices.Contains(inUse, i) {
			s, err := adoptSlot(p.cfg.Tag, i)
			if err == nil {
				if s.HostAddr != p.addrOf(i) && p.cfg.CIDR.Contains(s.HostAddr) {
					return fmt.Errorf("sandboxes started with another --network-cidr hold addresses in %s: use the former one until they have ended", p.cfg.CIDR)
				}
				p.slots[i] = &entry{slot: s, inUse: true}
				continue
			}
			p.log.Warn("network slot in use is broken, removing it", "slot", i, "error", err)
		}
		if err := destroySlot(p.cfg.Tag, i); err != nil {
			return err
		}
	}
	return nil
}

// adoptSlot finds a slot again that an earlier process made.
func adoptSlot(tag string, i int) (*Slot, error) {
	s, err := findKind(tag, i)
	if err != nil {
		return nil, err
	}
	link, err := netlink.LinkByName(linkName(tag, i))
	if err != nil {
		return nil, fmt.Errorf("find link %s: %w", linkName(tag, i), err)
	}
	addrs, err := dump(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("list addresses of %s: %w", linkName(tag, i), err)
	}
	if len(addrs) != 1 {
		return nil, fmt.Errorf("link %s has %d addresses, want 1", linkName(tag, i), len(addrs))
	}
	a, _ := netip.AddrFromSlice(addrs[0].IP)
	s.HostAddr = a.Unmap().Next()
	return s, nil
}

// CIDR is the range of the slots' addresses.
func (p *Pool) CIDR() netip.Prefix { return p.cfg.CIDR }

// capacity is how many pairs of addresses the range has.
func (p *Pool) capacity() int { return 1 << (31 - p.cfg.CIDR.Bits()) }

// addrOf is the host address of slot i; meaningless beyond the capacity.
func (p *Pool) addrOf(i int) netip.Addr {
	b := p.cfg.CIDR.Addr().As4()
	n := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	n += uint32(2*i + 1)
	return netip.AddrFrom4([4]byte{byte(n >> 24), byte(n >> 16), byte(n >> 8), byte(n)})
}

// reserve takes the next free index.
func (p *Pool) reserve() (*Slot, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return nil, ErrClosed
	}
	for n := range p.capacity() {
		i := (p.next + n) % p.capacity()
		if p.slots[i] == nil {
			p.next = i + 1
			s := newSlot(p.cfg.Tag, i, p.addrOf(i), p.cfg.TAP)
			p.slots[i] = &entry{slot: s}
			return s, nil
		}
	}
	return nil, ErrNoFreeSlot
}

// forget frees the index of a slot that is gone.
func (p *Pool) forget(s *Slot) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.slots, s.Index)
}

func (p *Pool) create() (*Slot, error) {
	s, err := p.reserve()
	if err != nil {
		return nil, err
	}
	if err := createSlot(p.cfg.Tag, s, p.cfg.Resolver); err != nil {
		p.forget(s)
		return nil, err
	}
	return s, nil
}

// refill keeps ready full until ctx ends.
func (p *Pool) refill(ctx context.Context) {
	pause := time.Second
	for {
		select {
		case <-ctx.Done():
			return
		case <-p.want:
		}
		s, err := p.create()
		if err == nil {
			p.ready <- s // never blocks: there are no more slots and tokens than room
			pause = time.Second
			continue
		}
		if ctx.Err() != nil {
			return
		}
		p.log.Error("cannot prepare a network slot", "error", err, "retry_in", pause)
		p.want <- struct{}{}
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		pause = min(2*pause, time.Minute)
	}
}

// Acquire returns a slot that nobody had before, with the policy in place.
func (p *Pool) Acquire(ctx context.Context, policy Policy) (*Slot, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s, err := p.take()
	if err != nil {
		return nil, err
	}
	if policy.AllowInternet {
		return s, nil
	}
	if err := setPolicy(s, policy); err != nil {
		return nil, errors.Join(err, p.remove(s))
	}
	return s, nil
}

// take gets a prepared slot, or a new one where none is ready.
func (p *Pool) take() (*Slot, error) {
	var s *Slot
	select {
	case s = <-p.ready:
		p.want <- struct{}{}
	default:
		var err error
		if s, err = p.create(); err != nil {
			return nil, err
		}
	}
	p.mu.Lock()
	p.slots[s.Index].inUse = true
	closed := p.closed
	p.mu.Unlock()
	if closed {
		return nil, errors.Join(ErrClosed, p.remove(s))
	}
	return s, nil
}

// Adopted returns the slot of that index which Open took over or Acquire gave out.
func (p *Pool) Adopted(index int) (*Slot, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if e := p.slots[index]; e != nil && e.inUse {
		return e.slot, true
	}
	return nil, false
}

// Release removes the slot and all that belongs to it. It is idempotent; after
// an error it can be called again. What ran in the slot must have ended.
func (p *Pool) Release(_ context.Context, s *Slot) error {
	return p.remove(s)
}

// remove takes the slot off the host unless that is done. The index is free
// again only afterwards, and only one caller gets there.
func (p *Pool) remove(s *Slot) error {
	p.mu.Lock()
	e := p.slots[s.Index]
	p.mu.Unlock()
	if e == nil || e.slot != s {
		return nil
	}
	e.releasing.Lock()
	defer e.releasing.Unlock()
	p.mu.Lock()
	gone := p.slots[s.Index] != e
	p.mu.Unlock()
	if gone {
		return nil
	}
	if err := destroySlot(p.cfg.Tag, s.Index); err != nil {
		return err
	}
	p.forget(s)
	return nil
}

// SetPolicy replaces the slot's policy. It applies to open connections, too.
func (p *Pool) SetPolicy(ctx context.Context, s *Slot, policy Policy) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return setPolicy(s, policy)
}

// Close ends the pool's goroutines and removes the slots that were prepared and
// not used. Slots in use stay as they are, and the host's table with them.
func (p *Pool) Close(_ context.Context) error {
	p.mu.Lock()
	closed := p.closed
	p.closed = true
	p.mu.Unlock()
	if closed {
		return nil
	}
	p.stop()
	p.work.Wait()
	var errs []error
	for drained := false; !drained; {
		select {
		case s := <-p.ready:
			errs = append(errs, p.remove(s))
		default:
			drained = true
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.slots) == 0 {
		errs = append(errs, removeHostTable(p.cfg.Tag), releaseRange(p.cfg.Tag))
	}
	return errors.Join(errs...)
}
