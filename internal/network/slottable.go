package network

import (
	"fmt"
	"net/netip"

	"github.com/google/nftables"
	"github.com/vishvananda/netns"
)

const slotTable = "wrenn"

// maxFlows bounds what a guest has under way with the outside at once. The host
// tracks every connection in one table for all, 262144 entries on most machines,
// and when that is full nobody gets a new one, the host's own services included.
const maxFlows = 4096

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

	// Whatever runs in this namespace is no part of the guest. A monitor that was taken
	// over may open sockets here; what the kernel answers has none.
	out := hookedChain(c, t, "output", nftables.ChainTypeFilter, nftables.ChainHookOutput, nftables.ChainPriorityFilter, nftables.ChainPolicyAccept)
	addRule(c, out, notRoot, drop)

	egress := addEgressChain(c, t, Policy{AllowInternet: true})
	fwd := hookedChain(c, t, "forward", nftables.ChainTypeFilter, nftables.ChainHookForward, nftables.ChainPriorityFilter, nftables.ChainPolicyDrop)
	addRule(c, fwd, invalid, drop)
	addRule(c, fwd, iif(uplink), original, dnatted, accept)
	addRule(c, fwd, iif(downlink), reply, accept)
	// A guest that went on elsewhere has connections that nobody else knows: it is told,
	// so that its programs do not wait for answers.
	addRule(c, fwd, iif(downlink), tcp, newFlow, noSYN, resetTCP)
	addRule(c, fwd, iif(downlink), newFlow, over(maxFlows), drop)
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
