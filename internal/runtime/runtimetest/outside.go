package runtimetest

import (
	"context"
	"io"
	"net"
	"net/netip"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Outside serves TCP in a namespace that stands for the internet: what comes goes
// back. It returns the address, for Harness.Outside. tag tells its link from those
// of other tests.
func Outside(t *testing.T, tag string) netip.AddrPort {
	const ours, theirs = "203.0.113.1/30", "203.0.113.2/30"
	link := "x" + tag
	var (
		ns netns.NsHandle
		l  net.Listener
	)
	inThread := func(f func() error) {
		t.Helper()
		done := make(chan error)
		go func() {
			runtime.LockOSThread() // the thread ends with the goroutine
			done <- f()
		}()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	inThread(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		ns, err = netns.Get()
		return err
	})
	t.Cleanup(func() { ns.Close() })
	attrs := netlink.NewLinkAttrs()
	attrs.Name = link
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(ns)}
	if err := netlink.LinkAdd(veth); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := netlink.LinkDel(veth); err != nil {
			t.Error(err)
		}
	})
	setUp := func(name, address string) error {
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(address)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	}
	if err := setUp(link, ours); err != nil {
		t.Fatal(err)
	}
	inThread(func() (err error) {
		if err := netns.Set(ns); err != nil {
			return err
		}
		if err := setUp("eth0", theirs); err != nil {
			return err
		}
		gateway := netip.MustParsePrefix(ours).Addr()
		if err := netlink.RouteAdd(&netlink.Route{Gw: gateway.AsSlice()}); err != nil {
			return err
		}
		l, err = new(net.ListenConfig).Listen(context.Background(), "tcp4", ":0")
		return err
	})
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
			go func() { _, _ = io.Copy(c, c) }()
		}
	}()
	port := l.Addr().(*net.TCPAddr).Port
	return netip.AddrPortFrom(netip.MustParsePrefix(theirs).Addr(), uint16(port))
}
