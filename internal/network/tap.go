package network

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Hardware addresses are the same in every slot: a guest that is resumed or forked
// into another slot finds the gateway where it remembers it, and the gateway knows
// the guest without asking. They are locally administered, so nobody else has them.
var (
	GuestMAC   = net.HardwareAddr{0x02, 0x57, 0x52, 0x4e, 0x4e, 0x15}
	gatewayMAC = net.HardwareAddr{0x02, 0x57, 0x52, 0x4e, 0x4e, 0x16}
)

// tapQueue is how many packets wait for a guest that is busy.
const tapQueue = 5000

// What a machine sends is bounded, so that one cannot take all of the host's network
// or of the processors that carry its packets: as much as Firecracker's own limiter
// is told, and here whichever monitor runs it, and also if it does not obey.
const (
	sendRate    = 200 << 20 // bytes a second
	sendBurst   = 100 << 20 // bytes
	sendPackets = 1000      // that wait, as on other links
	sendQueue   = 2 << 20   // bytes that wait, 10 ms; what comes on top of them is dropped
)

// limitSending bounds what leaves through the link.
func limitSending(h *netlink.Handle, link netlink.Link, rate uint64, burst uint32) error {
	// A link without a queue gets one with the bucket, and the kernel complains of it.
	if err := h.LinkSetTxQLen(link, sendPackets); err != nil {
		return fmt.Errorf("set queue of %s: %w", link.Attrs().Name, err)
	}
	err := h.QdiscReplace(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: link.Attrs().Index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Buffer: netlink.Xmittime(rate, burst), Limit: sendQueue,
	})
	if err != nil {
		return fmt.Errorf("bound what is sent through %s: %w (the kernel needs its token bucket filter: modprobe sch_tbf)", link.Attrs().Name, err)
	}
	return nil
}

// setUpTAP makes the TAP that a monitor attaches a machine to, in the NAT
// namespace, which the thread is in.
func setUpTAP(h *netlink.Handle) error {
	if err := withTAP(func(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1) }); err != nil {
		return err
	}
	link, err := h.LinkByName(downlink)
	if err != nil {
		return fmt.Errorf("find link %s: %w", downlink, err)
	}
	if err := h.LinkSetHardwareAddr(link, gatewayMAC); err != nil {
		return fmt.Errorf("set hardware address of %s: %w", downlink, err)
	}
	if err := h.LinkSetTxQLen(link, tapQueue); err != nil {
		return fmt.Errorf("set queue of %s: %w", downlink, err)
	}
	if err := addressAndUp(h, link, gatewayPrefix); err != nil {
		return err
	}
	neighbour := &netlink.Neigh{
		LinkIndex: link.Attrs().Index, State: netlink.NUD_PERMANENT,
		IP: GuestAddr.AsSlice(), HardwareAddr: GuestMAC,
	}
	if err := h.NeighSet(neighbour); err != nil {
		return fmt.Errorf("make the guest known on %s: %w", downlink, err)
	}
	return nil
}

// withTAP calls fn with the TAP of the thread's namespace, made if there is none.
// Nothing else may be attached to it.
func withTAP(fn func(fd int) error) error {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open TAP: %w: the kernel has no TUN/TAP driver (modprobe tun)", err)
	}
	defer f.Close()
	ifr, err := unix.NewIfreq(downlink)
	if err != nil {
		return err
	}
	ifr.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	fd := int(f.Fd())
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, ifr); err != nil {
		return fmt.Errorf("attach to %s: %w", downlink, err)
	}
	if err := fn(fd); err != nil {
		return fmt.Errorf("set up %s: %w", downlink, err)
	}
	return nil
}

// GiveTAP lets the user attach a machine to the slot's TAP, and nobody else but
// root. It is called before the machine starts: while one is attached it fails.
func (s *Slot) GiveTAP(uid uint32) error {
	if s.TAP == "" {
		return fmt.Errorf("network slot %d has no TAP", s.Index)
	}
	ns, err := netns.GetFromPath(s.NetNS)
	if err != nil {
		return fmt.Errorf("give TAP of network slot %d away: %w", s.Index, err)
	}
	defer ns.Close()
	err = inside(ns, func() error {
		return withTAP(func(fd int) error { return unix.IoctlSetInt(fd, unix.TUNSETOWNER, int(uid)) })
	})
	if err != nil {
		return fmt.Errorf("give TAP of network slot %d away: %w", s.Index, err)
	}
	return nil
}

// WaitAttached waits until the TAP passes packets, once a monitor has attached a
// machine to it: the kernel drops what comes in the first moments, and who sent it
// tries again only after a second. Slots without a TAP always pass them.
func (s *Slot) WaitAttached() error {
	if s.TAP == "" {
		return nil
	}
	ns, err := netns.GetFromPath(s.NetNS)
	if err != nil {
		return fmt.Errorf("wait for the machine of network slot %d: %w", s.Index, err)
	}
	defer ns.Close()
	err = inside(ns, func() error {
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		link, err := h.LinkByName(s.TAP)
		if err != nil {
			return fmt.Errorf("find link %s: %w", s.TAP, err)
		}
		return waitUp(h, link)
	})
	if err != nil {
		return fmt.Errorf("wait for the machine of network slot %d: %w", s.Index, err)
	}
	return nil
}

// findKind says of a slot that an earlier process made which kind it is, and
// whether it is whole.
func findKind(tag string, i int) (*Slot, error) {
	s := newSlot(tag, i, netip.Addr{}, false)
	if !isNamespace(s.NetNS) {
		return nil, fmt.Errorf("%s is no network namespace", s.NetNS)
	}
	if isNamespace(s.InnerNetNS) {
		return s, nil
	}
	ns, err := netns.GetFromPath(s.NetNS)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	h, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer h.Close()
	link, err := h.LinkByName(downlink)
	if err != nil {
		return nil, fmt.Errorf("find link %s: %w", downlink, err)
	}
	if link.Type() != "tuntap" && link.Type() != "tun" {
		return nil, errors.New("its guest namespace is gone")
	}
	return newSlot(tag, i, netip.Addr{}, true), nil
}
