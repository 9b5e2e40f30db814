package machine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
)

// configure brings the loopback and the machine's one interface up. What is
// there already stays, so that it can be repeated at any time.
func configure(p Params) error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		err = fmt.Errorf("loopback: %w", err)
	}
	return errors.Join(err, configureLink(p))
}

func configureLink(p Params) error {
	link, err := netlink.LinkByName(p.Link)
	if err != nil {
		return fmt.Errorf("find %s: %w", p.Link, err)
	}
	if p.MTU != 0 && link.Attrs().MTU != p.MTU {
		if err := netlink.LinkSetMTU(link, p.MTU); err != nil {
			return fmt.Errorf("set MTU of %s: %w", p.Link, err)
		}
	}
	addr := &netlink.Addr{IPNet: &net.IPNet{
		IP:   p.Address.Addr().AsSlice(),
		Mask: net.CIDRMask(p.Address.Bits(), p.Address.Addr().BitLen()),
	}}
	if err := netlink.AddrAdd(link, addr); err != nil && !errors.Is(err, syscall.EEXIST) {
		return fmt.Errorf("give %s the address %s: %w", p.Link, p.Address, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("bring %s up: %w", p.Link, err)
	}
	route := &netlink.Route{LinkIndex: link.Attrs().Index, Gw: p.Gateway.AsSlice()}
	if err := netlink.RouteReplace(route); err != nil {
		return fmt.Errorf("route by way of %s: %w", p.Gateway, err)
	}
	return nil
}

// configured reports whether the interface is as configure makes it: a route goes by way
// of the gateway only where it is up and has an address. It costs a resume far less than
// to ask for all of it by netlink.
func configured(p Params) bool {
	if !p.Gateway.Is4() {
		return false
	}
	gateway := p.Gateway.As4()
	want := fmt.Sprintf("\n%s\t00000000\t%08X\t", p.Link, binary.NativeEndian.Uint32(gateway[:]))
	if routes, err := os.ReadFile("/proc/net/route"); err != nil || !strings.Contains(string(routes), want) {
		return false
	}
	if p.MTU == 0 {
		return true
	}
	mtu, err := os.ReadFile("/sys/class/net/" + p.Link + "/mtu")
	return err == nil && strings.TrimSpace(string(mtu)) == strconv.Itoa(p.MTU)
}

// Outside reports whether addr is reached by way of the gateway: it is neither
// the machine's own, nor that of a network within it (of containers, say).
// Whoever uses such an address falsely gets no answer.
func (m *Machine) Outside(addr netip.Addr) bool {
	if addr == m.params.Gateway {
		return true
	}
	link, err := netlink.LinkByName(m.params.Link)
	if err != nil {
		return false
	}
	routes, err := netlink.RouteGet(addr.AsSlice())
	if err != nil || len(routes) == 0 {
		return false
	}
	return routes[0].LinkIndex == link.Attrs().Index && routes[0].Gw.Equal(m.params.Gateway.AsSlice())
}
