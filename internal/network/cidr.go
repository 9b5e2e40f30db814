package network

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The range of the slots is held by a route of type unreachable with a metric
// made of the tag. It keeps calls to slots that are gone from leaving the host
// by the default route, and tells other platforms on the host, and the next
// process of this one, which range is taken.
const metricBase = 0x57520000

func rangeMetric(tag string) int {
	n, err := strconv.ParseUint(tag, 16, 16)
	if err != nil {
		panic("network: tag was not checked: " + tag)
	}
	return metricBase | int(n)
}

type hostRoute struct {
	dst  netip.Prefix
	link string
}

// hostRoutes lists the host's IPv4 routes of all tables, without default routes
// and those to our own slots, and the range that our own tag holds, if any.
func hostRoutes(tag string) (routes []hostRoute, held netip.Prefix, err error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, held, err
	}
	defer h.Close()
	links, err := dump(h.LinkList)
	if err != nil {
		return nil, held, fmt.Errorf("list links: %w", err)
	}
	names := make(map[int]string, len(links))
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	list, err := dump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, held, fmt.Errorf("list routes: %w", err)
	}
	for _, r := range list {
		if r.Dst == nil {
			continue
		}
		addr, _ := netip.AddrFromSlice(r.Dst.IP)
		bits, _ := r.Dst.Mask.Size()
		dst := netip.PrefixFrom(addr.Unmap(), bits)
		switch {
		case r.Type == unix.RTN_UNREACHABLE && r.Priority == rangeMetric(tag):
			held = dst
		case bits < 8: // default routes, whole or in parts
		case strings.HasPrefix(names[r.LinkIndex], linkPrefix(tag)):
		default:
			routes = append(routes, hostRoute{dst, names[r.LinkIndex]})
		}
	}
	return routes, held, nil
}

// chooseCIDR returns want, or the range that the tag holds already, or the first
// candidate that is free; an error if want is not fit.
func chooseCIDR(tag string, want netip.Prefix) (netip.Prefix, error) {
	routes, held, err := hostRoutes(tag)
	if err != nil {
		return netip.Prefix{}, err
	}
	if want.IsValid() {
		want = want.Masked()
		if !want.Addr().Is4() || want.Bits() < 8 || want.Bits() > 30 {
			return netip.Prefix{}, fmt.Errorf("network range %s: want IPv4 with 8 to 30 bits, e.g. 10.211.0.0/16 (--network-cidr)", want)
		}
		if r, ok := clash(want, routes); ok {
			return netip.Prefix{}, fmt.Errorf("network range %s meets the host's route to %s (link %s): choose another with --network-cidr", want, r.dst, r.link)
		}
		return want, nil
	}
	try := candidates
	if held.IsValid() {
		try = append([]netip.Prefix{held}, candidates...)
	}
	for _, p := range try {
		if _, ok := clash(p, routes); !ok {
			return p, nil
		}
	}
	return netip.Prefix{}, errors.New("every range that slots could use meets a route of the host: name a free one with --network-cidr")
}

func clash(p netip.Prefix, routes []hostRoute) (hostRoute, bool) {
	for _, r := range routes {
		if r.dst.Overlaps(p) {
			return r, true
		}
	}
	return hostRoute{}, false
}

// holdRange takes the range for the tag and lets go of another it held.
func holdRange(tag string, cidr netip.Prefix) error {
	_, held, err := hostRoutes(tag)
	if err != nil {
		return err
	}
	if held == cidr {
		return nil
	}
	if err := releaseRange(tag); err != nil {
		return err
	}
	err = netlink.RouteAdd(&netlink.Route{Dst: ipNet(cidr), Type: unix.RTN_UNREACHABLE, Priority: rangeMetric(tag)})
	if err != nil {
		return fmt.Errorf("hold network range %s: %w", cidr, err)
	}
	return nil
}

// releaseRange is idempotent.
func releaseRange(tag string) error {
	for {
		_, held, err := hostRoutes(tag)
		if err != nil || !held.IsValid() {
			return err
		}
		err = netlink.RouteDel(&netlink.Route{Dst: ipNet(held), Type: unix.RTN_UNREACHABLE, Priority: rangeMetric(tag)})
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("release network range %s: %w", held, err)
		}
	}
}

// enableForwarding lets the host pass packets between slots and the internet.
func enableForwarding() error {
	const path = "/proc/sys/net/ipv4/ip_forward"
	if b, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(b)) == "1" {
		return nil
	}
	if err := os.WriteFile(path, []byte("1"), 0o644); err != nil {
		return fmt.Errorf("enable packet forwarding (run as root: sysctl -w net.ipv4.ip_forward=1): %w", err)
	}
	return nil
}

// hostResolver returns the first nameserver of the files that slots can use:
// IPv4 and not the loopback, which is another one in a namespace.
func hostResolver(files ...string) (netip.Addr, bool) {
	for _, name := range files {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 2 || f[0] != "nameserver" {
				continue
			}
			a, err := netip.ParseAddr(f[1])
			if err == nil && usableResolver(a.Unmap()) {
				return a.Unmap(), true
			}
		}
	}
	return netip.Addr{}, false
}

func usableResolver(a netip.Addr) bool {
	return a.Is4() && !a.IsLoopback() && !a.IsUnspecified() && !a.IsMulticast()
}
