package network

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// The world outside of the slots, as the tests build it.
const (
	publicAddr   = "198.51.100.2" // on the "internet"
	privateAddr  = "10.253.7.2"   // in the operator's network
	resolverAddr = "10.253.7.53"  // there too, as many resolvers are
	metadataAddr = "169.254.169.254"
)

// blockedAfter is how long a connection that should not come about may try.
const blockedAfter = 300 * time.Millisecond

func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes network namespaces")
	}
}

// newTag returns a tag that no platform and no other test has. Whatever the test
// leaves under it is removed, but is an error unless it failed anyway.
func newTag(t testing.TB) string {
	t.Helper()
	needRoot(t)
	b := make([]byte, 2)
	rand.Read(b)
	tag := hex.EncodeToString(b)
	t.Cleanup(func() {
		if left := leftovers(t, tag); len(left) > 0 && !t.Failed() {
			t.Errorf("left on the host: %v", left)
		}
		if err := RemoveAll(context.Background(), tag); err != nil {
			t.Errorf("RemoveAll: %v", err)
		}
	})
	return tag
}

func leftovers(t testing.TB, tag string) []string {
	t.Helper()
	left, err := Leftovers(tag)
	if err != nil {
		t.Fatalf("Leftovers: %v", err)
	}
	return left
}

// openPool opens a pool that the end of the test closes, its slots included.
func openPool(t testing.TB, cfg Config, inUse ...int) *Pool {
	t.Helper()
	p, err := Open(t.Context(), cfg, inUse)
	if err != nil {
		t.Fatalf("Open: %v", err)
	}
	t.Cleanup(func() { closePool(t, p) })
	return p
}

func closePool(t testing.TB, p *Pool) {
	t.Helper()
	ctx := context.Background()
	p.mu.Lock()
	var used []*Slot
	for _, e := range p.slots {
		if e.inUse {
			used = append(used, e.slot)
		}
	}
	p.mu.Unlock()
	for _, s := range used {
		if err := p.Release(ctx, s); err != nil {
			t.Errorf("Release: %v", err)
		}
	}
	if err := p.Close(ctx); err != nil {
		t.Errorf("Close: %v", err)
	}
}

func acquire(t testing.TB, p *Pool, policy Policy) *Slot {
	t.Helper()
	s, err := p.Acquire(t.Context(), policy)
	if err != nil {
		t.Fatalf("Acquire: %v", err)
	}
	return s
}

// guest opens the slot's guest namespace, whose kernel stack plays the guest. With
// a TAP it starts a machine first.
func guest(t testing.TB, s *Slot) netns.NsHandle {
	t.Helper()
	if s.TAP != "" {
		return startMachine(t, s)
	}
	return openNS(t, s.InnerNetNS)
}

func openNS(t testing.TB, path string) netns.NsHandle {
	t.Helper()
	ns, err := netns.GetFromPath(path)
	if err != nil {
		t.Fatalf("open namespace: %v", err)
	}
	t.Cleanup(func() { ns.Close() })
	return ns
}

// buildOutside makes a namespace that answers at publicAddr, privateAddr,
// resolverAddr and metadataAddr, with the host as its router.
func buildOutside(t testing.TB, tag string) netns.NsHandle {
	t.Helper()
	var ns netns.NsHandle
	err := onThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		ns, err = netns.Get()
		return err
	})
	if err != nil {
		t.Fatalf("make namespace: %v", err)
	}
	t.Cleanup(func() { ns.Close() })

	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.Close)
	name := "x" + tag
	link, err := addVeth(h, name, "eth0", ns)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := deleteLink(name); err != nil {
			t.Error(err)
		}
	})
	for _, a := range []string{"198.51.100.1/24", "10.253.7.1/24"} {
		if err := addressAndUp(h, link, netip.MustParsePrefix(a)); err != nil {
			t.Fatal(err)
		}
	}
	metadata := ipNet(netip.MustParsePrefix(metadataAddr + "/32"))
	if err := h.RouteReplace(&netlink.Route{Dst: metadata, LinkIndex: link.Attrs().Index, Scope: unix.RT_SCOPE_LINK}); err != nil {
		t.Fatal(err)
	}
	err = inside(ns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		eth, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		for _, a := range []string{publicAddr + "/24", privateAddr + "/24", resolverAddr + "/24", metadataAddr + "/32"} {
			if err := addressAndUp(h, eth, netip.MustParsePrefix(a)); err != nil {
				return err
			}
		}
		return replaceDefaultRoute(h, eth, netip.MustParseAddr("198.51.100.1"))
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// serve answers in ns, at addr, every line with the caller's address. ns may be
// 0: the host.
func serve(t testing.TB, ns netns.NsHandle, network, addr string) {
	t.Helper()
	var ln net.Listener
	var pc net.PacketConn
	err := in(ns, func() (err error) {
		if network == "udp" {
			pc, err = net.ListenPacket(network, addr)
		} else {
			ln, err = net.Listen(network, addr)
		}
		return err
	})
	if err != nil {
		t.Fatalf("listen: %v", err)
	}
	if pc != nil {
		t.Cleanup(func() { pc.Close() })
		go func() {
			b := make([]byte, 2048)
			for {
				_, from, err := pc.ReadFrom(b)
				if err != nil {
					return
				}
				pc.WriteTo([]byte(hostOf(from)+"\n"), from)
			}
		}()
		return
	}
	ctx, end := context.WithCancel(context.Background())
	t.Cleanup(func() { ln.Close(); end() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			stop := context.AfterFunc(ctx, func() { c.Close() })
			go func() {
				defer c.Close()
				defer stop()
				for r := bufio.NewReader(c); ; {
					if _, err := r.ReadString('\n'); err != nil {
						return
					}
					io.WriteString(c, hostOf(c.RemoteAddr())+"\n")
				}
			}()
		}
	}()
}

func hostOf(a net.Addr) string {
	h, _, _ := net.SplitHostPort(a.String())
	return h
}

func in(ns netns.NsHandle, fn func() error) error {
	if ns == 0 {
		return fn()
	}
	return inside(ns, fn)
}

// conversation is an open connection to what serve runs.
type conversation struct {
	net.Conn
	r *bufio.Reader
}

func dial(ns netns.NsHandle, network, addr string, timeout time.Duration) (*conversation, error) {
	var c net.Conn
	err := in(ns, func() (err error) {
		c, err = net.DialTimeout(network, addr, timeout)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &conversation{c, bufio.NewReader(c)}, nil
}

// ask sends a line and returns the answer: the address that the server saw.
func (c *conversation) ask(timeout time.Duration) (string, error) {
	c.SetDeadline(time.Now().Add(timeout))
	if _, err := fmt.Fprintln(c, "who am I?"); err != nil {
		return "", err
	}
	line, err := c.r.ReadString('\n')
	if err != nil {
		return "", err
	}
	return line[:len(line)-1], nil
}

func ask(ns netns.NsHandle, network, addr string, timeout time.Duration) (string, error) {
	c, err := dial(ns, network, addr, timeout)
	if err != nil {
		return "", err
	}
	defer c.Close()
	return c.ask(timeout)
}

// answers fails the test unless addr answers a caller in ns, and returns what it
// took the caller for.
func answers(t testing.TB, ns netns.NsHandle, network, addr string) string {
	t.Helper()
	seen, err := ask(ns, network, addr, 5*time.Second)
	if err != nil {
		t.Errorf("%s %s: %v, want an answer", network, addr, err)
	}
	return seen
}

func blocked(t testing.TB, ns netns.NsHandle, network, addr string) {
	t.Helper()
	if seen, err := ask(ns, network, addr, blockedAfter); err == nil {
		t.Errorf("%s %s answered (to %s), want it blocked", network, addr, seen)
	}
}
