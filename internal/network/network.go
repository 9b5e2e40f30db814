// Package network gives each sandbox its network slot: a network namespace with
// NAT, an inner namespace whose eth0 becomes the guest's, an address at which
// the host reaches the guest's ports, and the egress policy. Everything is done
// through netlink and nftables sockets.
//
//	guest namespace            NAT namespace                      host
//	wrenn-<tag>-<i>g           wrenn-<tag>-<i>
//	eth0 169.254.0.21/30 ───── tap0 169.254.0.22/30
//	                           eth0 CIDR+2i+1/31 ──────────────── w<tag>-<i> CIDR+2i/31
//
// A slot for a virtual machine has no guest namespace: tap0 is a real TAP that the
// machine is attached to, and its monitor runs in the NAT namespace. It has no
// business there but the TAP, so packets of its own do not leave.
//
// The NAT namespace passes tcp and udp for the slot's host address on to the
// guest, gives outgoing traffic that address, sends questions to port 53 of the
// gateway on to the resolver, and holds the sandbox's policy. The host's table
// wrenn_<tag> holds what is the same for all slots: no slot reaches another
// slot, a service of the host or a denied range, and nobody but the host opens
// connections into a slot. IPv6 is off but for the guest's loopback.
//
// Other tables of the host are not touched, and an accept in ours does not
// overrule a drop in theirs: where Docker or a firewall sets the forward chain's
// policy to drop, sandboxes have no internet until the operator lets the links
// w<tag>-* pass. Open logs a warning with the remedy if it sees such a chain in
// nftables (iptables-nft included); it cannot see those of legacy iptables.
//
// Names are made before what they name and everything carries the tag, so that
// Open finds and removes what a killed process left, whenever it was killed.
package network

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// The guest's side looks the same in every slot.
var (
	GuestPrefix = netip.MustParsePrefix("169.254.0.21/30")
	GuestAddr   = GuestPrefix.Addr()
	GatewayAddr = netip.MustParseAddr("169.254.0.22") // also the guest's resolver
)

// DefaultDeny is what sandboxes may not reach unless the operator says so:
// private, shared, link-local (the metadata address included), loopback,
// multicast and reserved addresses.
var DefaultDeny = prefixes(
	"0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16",
	"172.16.0.0/12", "192.0.0.0/24", "192.168.0.0/16", "198.18.0.0/15",
	"224.0.0.0/4", "240.0.0.0/4",
)

// candidates are tried in turn when the operator names no range for the slots.
var candidates = prefixes(
	"10.211.0.0/16", "100.96.0.0/16", "172.29.0.0/16", "10.87.0.0/16",
	"100.121.0.0/16", "192.168.192.0/19",
)

// Config is how a Pool is set up.
type Config struct {
	Tag      string         // 4 hex digits in the names of everything host-wide
	CIDR     netip.Prefix   // addresses of the slots; zero: the first of a few ranges that meets no route of the host
	Allow    []netip.Prefix // operator's exceptions to Deny
	Deny     []netip.Prefix // nil: DefaultDeny
	Resolver netip.Addr     // zero: the first nameserver of the host that slots can use
	Ready    int            // slots prepared ahead
	TAP      bool           // slots are for virtual machines
	Log      *slog.Logger   // nil: no log
}

// Policy is what a sandbox may reach.
type Policy struct {
	AllowInternet bool // false: nothing but answers to who called it; no resolver either
}

// Slot is the network of one sandbox.
type Slot struct {
	Index      int
	InnerNetNS string     // path of the namespace that the runtime puts the guest into; holds eth0. With a TAP it is NetNS
	NetNS      string     // path of the namespace that does the NAT
	TAP        string     // name of the TAP in NetNS that a virtual machine is attached to; empty: there is none
	HostAddr   netip.Addr // address at which the host reaches the guest
}

const (
	netnsDir  = "/run/netns"
	uplink    = "eth0" // in the NAT namespace: towards the host
	downlink  = "tap0" // in the NAT namespace: towards the guest
	guestLink = "eth0" // in the guest namespace
)

var tagPattern = regexp.MustCompile(`^[0-9a-f]{4}$`)

func checkTag(tag string) error {
	if !tagPattern.MatchString(tag) {
		return fmt.Errorf("network tag %q is not 4 hex digits", tag)
	}
	return nil
}

func linkPrefix(tag string) string      { return "w" + tag + "-" }
func linkName(tag string, i int) string { return linkPrefix(tag) + strconv.Itoa(i) }
func tableName(tag string) string       { return "wrenn_" + tag }
func nsPrefix(tag string) string        { return "wrenn-" + tag + "-" }

// newSlot says what slot i of the tag is called. It makes nothing.
func newSlot(tag string, i int, hostAddr netip.Addr, tap bool) *Slot {
	path := filepath.Join(netnsDir, nsPrefix(tag)+strconv.Itoa(i))
	if tap {
		return &Slot{Index: i, NetNS: path, InnerNetNS: path, TAP: downlink, HostAddr: hostAddr}
	}
	return &Slot{Index: i, NetNS: path, InnerNetNS: path + "g", HostAddr: hostAddr}
}

// indexOf reads the slot's index from the name of a link or namespace.
func indexOf(name, prefix string) (int, bool) {
	rest, ok := strings.CutPrefix(name, prefix)
	if !ok {
		return 0, false
	}
	i, err := strconv.Atoi(strings.TrimSuffix(rest, "g"))
	return i, err == nil && i >= 0
}

func prefixes(list ...string) []netip.Prefix {
	out := make([]netip.Prefix, len(list))
	for i, s := range list {
		out[i] = netip.MustParsePrefix(s)
	}
	return out
}
