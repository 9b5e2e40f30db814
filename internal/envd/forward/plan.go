package forward

import (
	"net/netip"
	"slices"
)

// listener is a TCP socket that listens.
type listener struct {
	addr netip.AddrPort // IPv4 addresses as such, also those of IPv6 sockets
	// only6 says of a listener on all IPv6 addresses that it does not take IPv4
	// connections.
	only6 bool
}

func compareListeners(a, b listener) int {
	if c := a.addr.Compare(b.addr); c != 0 || a.only6 == b.only6 {
		return c
	}
	if a.only6 {
		return 1
	}
	return -1
}

// plan decides which connections from outside go where: from each address of the
// machine and port to the listener on a loopback address. Where the sandbox
// itself listens there is no path.
func plan(listeners []listener, outside []netip.Addr, reserved uint16) map[netip.AddrPort]netip.AddrPort {
	paths := make(map[netip.AddrPort]netip.AddrPort)
	at := make(map[uint16][]listener) // by port: there may be thousands
	for _, l := range listeners {
		at[l.addr.Port()] = append(at[l.addr.Port()], l)
	}
	for _, l := range listeners {
		if !l.addr.Addr().IsLoopback() || l.addr.Port() == reserved {
			continue
		}
		for _, a := range outside {
			from := netip.AddrPortFrom(a, l.addr.Port())
			if served(at[from.Port()], from) {
				continue
			}
			if now, ok := paths[from]; !ok || nearer(a, l.addr.Addr(), now.Addr()) {
				paths[from] = l.addr
			}
		}
	}
	return paths
}

// served says whether one of the listeners takes connections to an address itself.
func served(listeners []listener, at netip.AddrPort) bool {
	addr := at.Addr().WithZone("")
	for _, l := range listeners {
		if l.addr.Port() != at.Port() {
			continue
		}
		switch bound := l.addr.Addr(); {
		case bound == addr:
			return true
		case !bound.IsUnspecified():
		case bound.Is4() == addr.Is4(), addr.Is4() && !l.only6:
			return true
		}
	}
	return false
}

// nearer says whether connections to the address from go rather to the loopback
// address a than to b: to that of its own family, then to the lowest.
func nearer(from, a, b netip.Addr) bool {
	if a.Is4() != b.Is4() {
		return a.Is4() == from.Is4()
	}
	return a.Less(b)
}

// without leaves out, once each, the listeners on the given addresses.
func without(listeners []listener, own []netip.AddrPort) []listener {
	for _, o := range own {
		o = netip.AddrPortFrom(o.Addr().WithZone(""), o.Port())
		i := slices.IndexFunc(listeners, func(l listener) bool { return l.addr == o })
		if i >= 0 {
			listeners = slices.Delete(listeners, i, i+1)
		}
	}
	return listeners
}
