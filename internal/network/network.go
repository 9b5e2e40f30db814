// Package network gives each sandbox its network slot: a network namespace with
// NAT, an inner namespace whose eth0 becomes the guest's, an address at which
// the host reaches the guest's ports, and the egress policy. Everything is done
// through netlink and nftables sockets.
package network

import "net/netip"

// The guest's side looks the same in every slot.
var (
	GuestPrefix = netip.MustParsePrefix("169.254.0.21/30")
	GuestAddr   = GuestPrefix.Addr()
	GatewayAddr = netip.MustParseAddr("169.254.0.22") // also the guest's resolver
)

// Policy is what a sandbox may reach.
type Policy struct {
	AllowInternet bool // false: nothing but answers to who called it; no resolver either
}

// Slot is the network of one sandbox.
type Slot struct {
	Index      int
	InnerNetNS string     // path of the namespace that the runtime puts the guest into; holds eth0
	NetNS      string     // path of the namespace that does the NAT
	HostAddr   netip.Addr // address at which the host reaches the guest
}
