package network

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

var both = []string{"tcp", "udp"}

func TestHostAndGuestReachEachOtherOnlyAsAllowed(t *testing.T) {
	onBothKinds(t, testHostAndGuestReachEachOtherOnlyAsAllowed)
}

func testHostAndGuestReachEachOtherOnlyAsAllowed(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	p := openPool(t, Config{TAP: tap, Tag: tag, Resolver: netip.MustParseAddr(resolverAddr), Ready: 2})
	s := acquire(t, p, Policy{AllowInternet: true})
	other := acquire(t, p, Policy{AllowInternet: true})
	g, og := guest(t, s), guest(t, other)

	for _, network := range both {
		serve(t, g, network, "0.0.0.0:8000")
		serve(t, og, network, "0.0.0.0:8000")
		serve(t, 0, network, "0.0.0.0:18931") // a service of the host
		for _, a := range []string{publicAddr + ":80", privateAddr + ":80", metadataAddr + ":80", resolverAddr + ":80", resolverAddr + ":53"} {
			serve(t, outside, network, a)
		}
		t.Run("the host reaches the guest over "+network, func(t *testing.T) {
			if seen := answers(t, 0, network, s.HostAddr.String()+":8000"); seen != s.HostAddr.Prev().String() {
				t.Errorf("the guest saw %s, want the host's end %s", seen, s.HostAddr.Prev())
			}
		})
		t.Run("the guest reaches the internet over "+network, func(t *testing.T) {
			if seen := answers(t, g, network, publicAddr+":80"); seen != "198.51.100.1" {
				t.Errorf("the internet saw %s, want the host", seen)
			}
		})
		t.Run("the guest reaches the resolver over "+network, func(t *testing.T) {
			answers(t, g, network, GatewayAddr.String()+":53")
			answers(t, g, network, resolverAddr+":53")
			blocked(t, g, network, resolverAddr+":80")
		})
		for _, a := range []string{privateAddr, metadataAddr} {
			t.Run("the guest does not reach "+a+" over "+network, func(t *testing.T) {
				answers(t, 0, network, a+":80") // it is there
				blocked(t, g, network, a+":80")
			})
		}
		t.Run("the guest does not reach another slot over "+network, func(t *testing.T) {
			answers(t, 0, network, other.HostAddr.String()+":8000")
			blocked(t, g, network, other.HostAddr.String()+":8000")
		})
		t.Run("the guest does not reach the host over "+network, func(t *testing.T) {
			answers(t, 0, network, "127.0.0.1:18931")
			for _, a := range hostAddrs(t) {
				blocked(t, g, network, net.JoinHostPort(a, "18931"))
			}
			blocked(t, g, network, GatewayAddr.String()+":18931")
		})
		t.Run("nobody but the host reaches the guest over "+network, func(t *testing.T) {
			blocked(t, outside, network, s.HostAddr.String()+":8000")
		})
	}
}

// hostAddrs lists the IPv4 addresses of the host, loopback and slots' links
// included.
func hostAddrs(t *testing.T) []string {
	t.Helper()
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, a := range addrs {
		if ip := a.(*net.IPNet).IP; ip.To4() != nil && !ip.IsLoopback() {
			out = append(out, ip.String())
		}
	}
	return out
}

func TestOperatorsRangesReplaceAndOverruleTheDenied(t *testing.T) {
	onBothKinds(t, testOperatorsRangesReplaceAndOverruleTheDenied)
}

func testOperatorsRangesReplaceAndOverruleTheDenied(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	for _, a := range []string{publicAddr, privateAddr, resolverAddr} {
		serve(t, outside, "tcp", a+":80")
	}
	cfg := Config{
		Tag:   tag,
		TAP:   tap,
		Allow: prefixes(privateAddr + "/32"),
		Deny:  prefixes("10.253.0.0/16", "198.51.100.0/24", "fc00::/7"),
	}
	p := openPool(t, cfg)
	s := acquire(t, p, Policy{AllowInternet: true})
	other := acquire(t, p, Policy{AllowInternet: true})
	g := guest(t, s)
	serve(t, guest(t, other), "tcp", "0.0.0.0:8000")
	answers(t, g, "tcp", privateAddr+":80")
	blocked(t, g, "tcp", resolverAddr+":80")
	blocked(t, g, "tcp", publicAddr+":80")
	blocked(t, g, "tcp", other.HostAddr.String()+":8000") // though no range denies it
}

func TestWhatTheOperatorAllowsIsNeverTheHostOrASlot(t *testing.T) {
	onBothKinds(t, testWhatTheOperatorAllowsIsNeverTheHostOrASlot)
}

func testWhatTheOperatorAllowsIsNeverTheHostOrASlot(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	serve(t, outside, "tcp", privateAddr+":80")
	serve(t, 0, "tcp", "0.0.0.0:18931")
	p := openPool(t, Config{TAP: tap, Tag: tag, Allow: prefixes("0.0.0.0/0")})
	s := acquire(t, p, Policy{AllowInternet: true})
	other := acquire(t, p, Policy{AllowInternet: true})
	g := guest(t, s)
	serve(t, guest(t, other), "tcp", "0.0.0.0:8000")
	answers(t, g, "tcp", privateAddr+":80")
	blocked(t, g, "tcp", other.HostAddr.String()+":8000")
	blocked(t, g, "tcp", "10.253.7.1:18931")
}

func TestWithoutInternetOnlyAnswersLeave(t *testing.T) {
	onBothKinds(t, testWithoutInternetOnlyAnswersLeave)
}

func testWithoutInternetOnlyAnswersLeave(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	p := openPool(t, Config{TAP: tap, Tag: tag, Resolver: netip.MustParseAddr(resolverAddr), Ready: 1})
	s := acquire(t, p, Policy{})
	g := guest(t, s)
	for _, network := range both {
		serve(t, g, network, "0.0.0.0:8000")
		serve(t, outside, network, publicAddr+":80")
		serve(t, outside, network, resolverAddr+":53")
		blocked(t, g, network, publicAddr+":80")
		blocked(t, g, network, resolverAddr+":53")
		blocked(t, g, network, GatewayAddr.String()+":53")
		answers(t, 0, network, s.HostAddr.String()+":8000")
	}
	start := time.Now()
	if _, err := dial(g, "tcp", publicAddr+":80", time.Minute); err == nil || time.Since(start) > 10*time.Second {
		t.Errorf("a forbidden connection took %v to fail (%v), want at once", time.Since(start), err)
	}
}

func TestSetPolicyAppliesToOpenConnections(t *testing.T) {
	onBothKinds(t, testSetPolicyAppliesToOpenConnections)
}

func testSetPolicyAppliesToOpenConnections(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	serve(t, outside, "tcp", publicAddr+":80")
	p := openPool(t, Config{TAP: tap, Tag: tag})
	s := acquire(t, p, Policy{AllowInternet: true})
	g := guest(t, s)
	serve(t, g, "tcp", "0.0.0.0:8000")

	out, err := dial(g, "tcp", publicAddr+":80", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	into, err := dial(0, "tcp", s.HostAddr.String()+":8000", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer into.Close()
	if _, err := out.ask(time.Second); err != nil {
		t.Fatal(err)
	}

	if err := p.SetPolicy(t.Context(), s, Policy{}); err != nil {
		t.Fatal(err)
	}
	if _, err := out.ask(5 * time.Second); !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("a connection opened before: %v, want it reset", err)
	}
	blocked(t, g, "tcp", publicAddr+":80")
	if _, err := into.ask(time.Second); err != nil {
		t.Errorf("the host's connection into the guest: %v", err)
	}

	if err := p.SetPolicy(t.Context(), s, Policy{AllowInternet: true}); err != nil {
		t.Fatal(err)
	}
	answers(t, g, "tcp", publicAddr+":80")
	if _, err := into.ask(time.Second); err != nil {
		t.Errorf("the host's connection into the guest: %v", err)
	}
}

func TestSetPolicyStopsWhatTheInternetSends(t *testing.T) {
	onBothKinds(t, testSetPolicyStopsWhatTheInternetSends)
}

func testSetPolicyStopsWhatTheInternetSends(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	p := openPool(t, Config{TAP: tap, Tag: tag})
	s := acquire(t, p, Policy{AllowInternet: true})
	var server net.PacketConn
	err := inside(outside, func() (err error) {
		server, err = net.ListenPacket("udp", publicAddr+":9")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	c, err := dial(guest(t, s), "udp", publicAddr+":9", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 64)
	server.SetReadDeadline(time.Now().Add(5 * time.Second))
	_, from, err := server.ReadFrom(b)
	if err != nil {
		t.Fatal(err)
	}
	for _, allow := range []bool{true, false, true} {
		if err := p.SetPolicy(t.Context(), s, Policy{AllowInternet: allow}); err != nil {
			t.Fatal(err)
		}
		if _, err := server.WriteTo([]byte("news"), from); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(blockedAfter))
		if _, err := c.Read(b); (err == nil) != allow {
			t.Errorf("with internet %v, reading what the server sent: %v", allow, err)
		}
	}
}

func TestForgedSourceAddressesDoNotLeave(t *testing.T) {
	onBothKinds(t, testForgedSourceAddressesDoNotLeave)
}

func testForgedSourceAddressesDoNotLeave(t *testing.T, tap bool) {
	tag := newTag(t)
	outside := buildOutside(t, tag)
	p := openPool(t, Config{TAP: tap, Tag: tag})
	s := acquire(t, p, Policy{AllowInternet: true})
	var pc net.PacketConn
	err := inside(outside, func() (err error) {
		pc, err = net.ListenPacket("udp", publicAddr+":9")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()

	receive := func() string {
		b := make([]byte, 64)
		pc.SetReadDeadline(time.Now().Add(blockedAfter))
		n, _, err := pc.ReadFrom(b)
		if err != nil {
			return ""
		}
		return string(b[:n])
	}
	forged := []string{"203.0.113.9", privateAddr, publicAddr, s.HostAddr.Prev().String(), p.CIDR().Addr().Next().String()}
	for _, place := range []struct {
		name string
		ns   netns.NsHandle
		own  netip.Addr
	}{
		{"by the guest", guest(t, s), GuestAddr},
		// The host does not count on the namespace's rules.
		{"by a NAT namespace without rules", withoutRules(t, acquire(t, p, Policy{AllowInternet: true})), p.addrOf(s.Index + 1)},
	} {
		t.Run(place.name, func(t *testing.T) {
			if err := sendFrom(place.ns, place.own, "own"); err != nil {
				t.Fatal(err)
			}
			if got := receive(); got != "own" {
				t.Fatalf("with its own source address: received %q, want the packet", got)
			}
			for _, src := range forged {
				if err := sendFrom(place.ns, netip.MustParseAddr(src), src); err != nil {
					t.Fatal(err)
				}
				if got := receive(); got != "" {
					t.Errorf("packet with the forged source %s arrived", got)
				}
			}
		})
	}
}

// withoutRules takes the rules out of the slot's NAT namespace and opens it.
func withoutRules(t *testing.T, s *Slot) netns.NsHandle {
	t.Helper()
	ns := openNS(t, s.NetNS)
	err := inside(ns, func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		c.DelTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: slotTable})
		return c.Flush()
	})
	if err != nil {
		t.Fatal(err)
	}
	return ns
}

// sendFrom sends a UDP packet to publicAddr:9 with a source address of choice.
func sendFrom(ns netns.NsHandle, src netip.Addr, text string) error {
	dst := netip.MustParseAddr(publicAddr).As4()
	from := src.As4()
	p := make([]byte, 28, 28+len(text))
	p[0], p[8], p[9] = 0x45, 64, unix.IPPROTO_UDP
	copy(p[12:], from[:])
	copy(p[16:], dst[:])
	p[20], p[21] = 0x30, 0x39 // source port
	p[23] = 9                 // destination port; no checksum
	p[25] = byte(8 + len(text))
	p = append(p, text...)
	return inside(ns, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_RAW)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Sendto(fd, p, 0, &unix.SockaddrInet4{Addr: dst}); err != nil {
			return fmt.Errorf("send raw: %w", err)
		}
		return nil
	})
}

func TestAnotherFirewallThatDropsForwardedPacketsIsReported(t *testing.T) {
	needRoot(t)
	for name, c := range map[string]struct {
		hook   *nftables.ChainHook
		policy nftables.ChainPolicy
		want   bool
	}{
		"forward drop":   {nftables.ChainHookForward, nftables.ChainPolicyDrop, true},
		"forward accept": {nftables.ChainHookForward, nftables.ChainPolicyAccept, false},
		"input drop":     {nftables.ChainHookInput, nftables.ChainPolicyDrop, false},
	} {
		t.Run(name, func(t *testing.T) {
			var log strings.Builder
			err := onThread(func() error { // in a namespace of its own: the host has other users
				if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
					return err
				}
				c2, err := nftables.New()
				if err != nil {
					return err
				}
				table := c2.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "filter"})
				hookedChain(c2, table, "FORWARD", nftables.ChainTypeFilter, c.hook, nftables.ChainPriorityFilter, c.policy)
				if err := c2.Flush(); err != nil {
					return err
				}
				return warnOfForwardDrop("ab12", slog.New(slog.NewTextHandler(&log, nil)))
			})
			if err != nil {
				t.Fatal(err)
			}
			if got := strings.Contains(log.String(), "-i 'wab12-+' -j ACCEPT"); got != c.want {
				t.Errorf("logged %q, want a remedy: %v", log.String(), c.want)
			}
		})
	}
}

func TestIPv6IsOffButForTheGuestsLoopback(t *testing.T) {
	onBothKinds(t, testIPv6IsOffButForTheGuestsLoopback)
}

func testIPv6IsOffButForTheGuestsLoopback(t *testing.T, tap bool) {
	p := openPool(t, Config{TAP: tap, Tag: newTag(t)})
	s := acquire(t, p, Policy{AllowInternet: true})
	g := guest(t, s)
	serve(t, g, "tcp", "[::1]:8000")
	answers(t, g, "tcp", "[::1]:8000")
	for name, ns := range map[string]netns.NsHandle{"guest": g, "NAT": openNS(t, s.NetNS)} {
		var addrs []net.Addr
		err := inside(ns, func() (err error) {
			addrs, err = net.InterfaceAddrs()
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range addrs {
			if ip := a.(*net.IPNet).IP; ip.To4() == nil && !ip.IsLoopback() {
				t.Errorf("%s namespace has %s", name, ip)
			}
		}
	}
	link, err := net.InterfaceByName(linkName(p.cfg.Tag, s.Index))
	if err != nil {
		t.Fatal(err)
	}
	addrs, err := link.Addrs()
	if err != nil || len(addrs) != 1 {
		t.Errorf("host end has %v (%v), want the IPv4 address alone", addrs, err)
	}
}
