package machine

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// closeConnections ends the TCP connections with the world outside that are there,
// but for that with the address except. Their other ends have gone: the machine was
// elsewhere, or another one, when they were made, and who waits at one would wait
// for hours. Programs see a connection that was aborted.
func (m *Machine) closeConnections(except netip.AddrPort) error {
	var errs []error
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} { // the latter for IPv4 by sockets of IPv6, as Go's servers have
		sockets, err := netlink.SocketDiagTCP(family)
		if err != nil {
			return fmt.Errorf("list connections: %w", err)
		}
		for _, s := range sockets {
			if s.State == netlink.TCP_LISTEN || s.State == netlink.TCP_TIME_WAIT || s.State == netlink.TCP_CLOSE {
				continue
			}
			remote, ok := netip.AddrFromSlice(s.ID.Destination)
			if remote = remote.Unmap(); !ok || !remote.Is4() || !m.Outside(remote) {
				continue
			}
			if netip.AddrPortFrom(remote, s.ID.DestinationPort) == except {
				continue
			}
			err := netlink.SocketDestroy(
				&net.TCPAddr{IP: s.ID.Source, Port: int(s.ID.SourcePort)},
				&net.TCPAddr{IP: s.ID.Destination, Port: int(s.ID.DestinationPort)},
			)
			if err != nil && !errors.Is(err, syscall.ENOENT) { // it has ended just now
				errs = append(errs, fmt.Errorf("close connection with %s: %w", remote, err))
			}
		}
	}
	return errors.Join(errs...)
}
