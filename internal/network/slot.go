package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

var gatewayPrefix = netip.PrefixFrom(GatewayAddr, GuestPrefix.Bits())

var (
	natSysctls = [][2]string{
		{"ipv6/conf/all/disable_ipv6", "1"},
		{"ipv6/conf/default/disable_ipv6", "1"},
		{"ipv4/ip_forward", "1"},
		{"ipv4/conf/all/accept_redirects", "0"},
		{"ipv4/conf/all/send_redirects", "0"},
	}
	// The loopback keeps ::1, which programs bind to; it leads nowhere.
	guestSysctls = [][2]string{{"ipv6/conf/default/disable_ipv6", "1"}}
)

// createSlot makes the slot's namespaces, links and rules, with the policy that
// allows the internet. On error nothing is left.
func createSlot(tag string, s *Slot, resolver netip.Addr) (err error) {
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("create network slot %d: %w", s.Index, err), destroySlot(tag, s.Index))
		}
	}()
	guest := netns.None()
	if s.TAP == "" {
		if guest, err = createNamespace(s.InnerNetNS, guestSysctls); err != nil {
			return err
		}
		defer guest.Close()
	}
	nat, err := createNamespace(s.NetNS, natSysctls)
	if err != nil {
		return err
	}
	defer nat.Close()
	host, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer host.Close()
	// Rules and links take their time in the kernel, and neither waits for the other
	// there. Nobody is in the slot before it has both.
	rules := make(chan error, 1)
	go func() { rules <- inside(nat, func() error { return installSlotTable(s, resolver) }) }()
	hostEnd, err := setUpHostEnd(host, tag, s, nat)
	if err == nil {
		err = inside(nat, func() error { return setUpNAT(s, guest) })
	}
	if err = errors.Join(err, <-rules); err != nil {
		return err
	}
	return waitUp(host, hostEnd)
}

// setUpHostEnd makes the pair of links between the host and the NAT namespace.
func setUpHostEnd(h *netlink.Handle, tag string, s *Slot, nat netns.NsHandle) (netlink.Link, error) {
	name := linkName(tag, s.Index)
	link, err := addVeth(h, name, uplink, nat)
	if err != nil {
		return nil, err
	}
	for _, v := range [][2]string{
		{"ipv6/conf/" + name + "/disable_ipv6", "1"},
		{"ipv4/conf/" + name + "/accept_redirects", "0"},
	} {
		if err := writeSysctl(v[0], v[1]); err != nil {
			return nil, err
		}
	}
	return link, addressAndUp(h, link, netip.PrefixFrom(s.HostAddr.Prev(), 31))
}

// setUpNAT runs in the NAT namespace: the link to the guest, addresses and the route
// out.
func setUpNAT(s *Slot, guest netns.NsHandle) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	up, err := h.LinkByName(uplink)
	if err != nil {
		return fmt.Errorf("find link %s: %w", uplink, err)
	}
	if err := addressAndUp(h, up, netip.PrefixFrom(s.HostAddr, 31)); err != nil {
		return err
	}
	if err := replaceDefaultRoute(h, up, s.HostAddr.Prev()); err != nil {
		return err
	}
	if s.TAP != "" {
		if err := limitSending(h, up, sendRate, sendBurst); err != nil {
			return err
		}
		return setUpTAP(h) // it is up once a machine is attached
	}
	return setUpVeth(h, guest)
}

// setUpVeth makes the pair of links to the guest namespace.
func setUpVeth(h *netlink.Handle, guest netns.NsHandle) error {
	down, err := addVeth(h, downlink, guestLink, guest)
	if err != nil {
		return err
	}
	if err := addressAndUp(h, down, gatewayPrefix); err != nil {
		return err
	}
	if err := inside(guest, setUpGuest); err != nil {
		return err
	}
	return waitUp(h, down)
}

// setUpGuest runs in the guest namespace. It is idempotent.
func setUpGuest() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find link lo: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set link lo up: %w", err)
	}
	eth, err := h.LinkByName(guestLink)
	if err != nil {
		return fmt.Errorf("find link %s: %w", guestLink, err)
	}
	if err := addressAndUp(h, eth, GuestPrefix); err != nil {
		return err
	}
	return replaceDefaultRoute(h, eth, GatewayAddr)
}

// Prepare puts address, link state and default route of the inner eth0 (back)
// in place. gVisor takes them off the interface at each start, so callers call
// it before every one. With a TAP there is nothing to do: the machine sets up its own.
func (s *Slot) Prepare() error {
	if s.TAP != "" {
		if !isNamespace(s.NetNS) {
			return fmt.Errorf("prepare network slot %d: %s is no network namespace", s.Index, s.NetNS)
		}
		return nil
	}
	ns, err := netns.GetFromPath(s.InnerNetNS)
	if err != nil {
		return fmt.Errorf("prepare network slot %d: %w", s.Index, err)
	}
	defer ns.Close()
	if err := inside(ns, setUpGuest); err != nil {
		return fmt.Errorf("prepare network slot %d: %w", s.Index, err)
	}
	return nil
}

// destroySlot removes whatever there is of slot i. It is idempotent.
func destroySlot(tag string, i int) error {
	s := newSlot(tag, i, netip.Addr{}, false)
	if err := errors.Join(
		deleteLink(linkName(tag, i)),
		removeNamespace(s.NetNS),
		removeNamespace(s.InnerNetNS),
	); err != nil {
		return fmt.Errorf("remove network slot %d: %w", i, err)
	}
	return nil
}

func deleteLink(name string) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err == nil {
		err = h.LinkDel(link)
	}
	// ENODEV: the kernel was faster, ending the namespace of the other end.
	if errors.As(err, &netlink.LinkNotFoundError{}) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("delete link %s: %w", name, err)
	}
	return nil
}

func addVeth(h *netlink.Handle, name, peer string, peerNS netns.NsHandle) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: peer, PeerNamespace: netlink.NsFd(peerNS)}
	if err := h.LinkAdd(veth); err != nil {
		return nil, fmt.Errorf("add link %s: %w", name, err)
	}
	link, err := h.LinkByName(name)
	if err != nil {
		return nil, fmt.Errorf("find link %s: %w", name, err)
	}
	return link, nil
}

func addressAndUp(h *netlink.Handle, link netlink.Link, p netip.Prefix) error {
	addr := &netlink.Addr{IPNet: ipNet(p), Scope: unix.RT_SCOPE_UNIVERSE}
	if err := h.AddrReplace(link, addr); err != nil {
		return fmt.Errorf("set address %s on %s: %w", p, link.Attrs().Name, err)
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set link %s up: %w", link.Attrs().Name, err)
	}
	return nil
}

// waitUp waits until a link whose peer has just come up passes packets. The
// kernel sees to that in the background; until then it drops what is sent, and
// the first connection through a slot would take a second longer. It must run in
// the namespace of h. From Linux 6.8 on, asking is enough and nothing is waited for.
func waitUp(h *netlink.Handle, link netlink.Link) error {
	const limit = 5 * time.Second
	events, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_LINK)
	if err != nil {
		return err
	}
	defer events.Close()
	deadline := time.Now().Add(limit)
	for {
		now, err := h.LinkByIndex(link.Attrs().Index)
		if err != nil {
			return fmt.Errorf("find link %s: %w", link.Attrs().Name, err)
		}
		left := time.Until(deadline)
		switch {
		case now.Attrs().OperState == netlink.OperUp:
			return nil
		case left <= 0:
			return fmt.Errorf("link %s is %s %v after it was set up", link.Attrs().Name, now.Attrs().OperState, limit)
		}
		tv := unix.NsecToTimeval(max(left, time.Millisecond).Nanoseconds())
		if err := events.SetReceiveTimeout(&tv); err != nil {
			return err
		}
		// A timeout or an overrun is no matter: the state is asked for again.
		_, _, _ = events.Receive()
	}
}

func replaceDefaultRoute(h *netlink.Handle, link netlink.Link, via netip.Addr) error {
	route := &netlink.Route{
		LinkIndex: link.Attrs().Index,
		Dst:       ipNet(netip.PrefixFrom(netip.IPv4Unspecified(), 0)),
		Gw:        via.AsSlice(),
	}
	if err := h.RouteReplace(route); err != nil {
		return fmt.Errorf("set default route via %s: %w", via, err)
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
