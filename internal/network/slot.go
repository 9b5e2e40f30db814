package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
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
	guest, err := createNamespace(s.InnerNetNS, guestSysctls)
	if err != nil {
		return err
	}
	defer guest.Close()
	nat, err := createNamespace(s.NetNS, natSysctls)
	if err != nil {
		return err
	}
	defer nat.Close()
	if err := linkToHost(tag, s, nat); err != nil {
		return err
	}
	err = inside(nat, func() error {
		if err := setUpNAT(s, guest); err != nil {
			return err
		}
		return installSlotTable(s, resolver)
	})
	if err != nil {
		return err
	}
	return inside(guest, setUpGuest)
}

// linkToHost makes the pair of links between the host and the NAT namespace.
func linkToHost(tag string, s *Slot, nat netns.NsHandle) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	name := linkName(tag, s.Index)
	link, err := addVeth(h, name, uplink, nat)
	if err != nil {
		return err
	}
	for _, v := range [][2]string{
		{"ipv6/conf/" + name + "/disable_ipv6", "1"},
		{"ipv4/conf/" + name + "/accept_redirects", "0"},
		{"ipv4/conf/" + name + "/rp_filter", "1"},
	} {
		if err := writeSysctl(v[0], v[1]); err != nil {
			return err
		}
	}
	return addressAndUp(h, link, netip.PrefixFrom(s.HostAddr.Prev(), 31))
}

// setUpNAT runs in the NAT namespace: the pair of links to the guest, addresses
// and the route out.
func setUpNAT(s *Slot, guest netns.NsHandle) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	down, err := addVeth(h, downlink, guestLink, guest)
	if err != nil {
		return err
	}
	if err := addressAndUp(h, down, gatewayPrefix); err != nil {
		return err
	}
	up, err := h.LinkByName(uplink)
	if err != nil {
		return fmt.Errorf("find link %s: %w", uplink, err)
	}
	if err := addressAndUp(h, up, netip.PrefixFrom(s.HostAddr, 31)); err != nil {
		return err
	}
	return replaceDefaultRoute(h, up, s.HostAddr.Prev())
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
// it before every one.
func (s *Slot) Prepare() error {
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
	s := newSlot(tag, i, netip.Addr{})
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

const slotTable = "wrenn"

// installSlotTable runs in the NAT namespace, which has no rules yet.
func installSlotTable(s *Slot, resolver netip.Addr) error {
	c, err := nftables.New()
	if err != nil {
		return err
	}
	t := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: slotTable})

	spoof := hookedChain(c, t, "spoof", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, nftables.ChainPriorityRaw, nftables.ChainPolicyAccept)
	addRule(c, spoof, iif(downlink), saddrNot(GuestAddr), drop)

	pre := hookedChain(c, t, "prerouting", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, nftables.ChainPriorityNATDest, nftables.ChainPolicyAccept)
	for _, proto := range []match{tcp, udp} {
		addRule(c, pre, iif(uplink), daddr(host(s.HostAddr)), proto, dnat(GuestAddr))
		if resolver.IsValid() {
			addRule(c, pre, iif(downlink), daddr(host(GatewayAddr)), proto, dport(53), dnat(resolver))
		}
	}

	post := hookedChain(c, t, "postrouting", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, nftables.ChainPriorityNATSource, nftables.ChainPolicyAccept)
	addRule(c, post, oif(uplink), snat(s.HostAddr))

	in := hookedChain(c, t, "input", nftables.ChainTypeFilter, nftables.ChainHookInput, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	addRule(c, in, icmp, echoRequest, accept)

	egress := addEgressChain(c, t, Policy{AllowInternet: true})
	fwd := hookedChain(c, t, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	addRule(c, fwd, invalid, drop)
	addRule(c, fwd, iif(uplink), original, dnatted, accept)
	addRule(c, fwd, iif(downlink), reply, accept)
	addRule(c, fwd, jump(egress))
	// What is not allowed fails at once instead of after the guest's timeout.
	addRule(c, fwd, iif(downlink), tcp, resetTCP)
	addRule(c, fwd, iif(downlink), portUnreachable)

	if err := c.Flush(); err != nil {
		return fmt.Errorf("install rules of the slot: %w", err)
	}
	return nil
}

// addEgressChain fills the chain that passes connections which the guest opens.
func addEgressChain(c *nftables.Conn, t *nftables.Table, policy Policy) *nftables.Chain {
	egress := c.AddChain(&nftables.Chain{Table: t, Name: "egress"})
	if policy.AllowInternet {
		addRule(c, egress, iif(downlink), original, accept)
		addRule(c, egress, iif(uplink), reply, accept)
	}
	return egress
}

// setPolicy replaces the slot's policy in one transaction. It applies to
// connections that are open already, too.
func setPolicy(s *Slot, policy Policy) error {
	ns, err := netns.GetFromPath(s.NetNS)
	if err != nil {
		return fmt.Errorf("set policy of network slot %d: %w", s.Index, err)
	}
	defer ns.Close()
	err = inside(ns, func() error {
		c, err := nftables.New()
		if err != nil {
			return err
		}
		t := &nftables.Table{Family: nftables.TableFamilyIPv4, Name: slotTable}
		c.FlushChain(&nftables.Chain{Table: t, Name: "egress"})
		addEgressChain(c, t, policy)
		return c.Flush()
	})
	if err != nil {
		return fmt.Errorf("set policy of network slot %d: %w", s.Index, err)
	}
	return nil
}
