package forward

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// The kernel's socket diagnostics: struct inet_diag_req_v2 is the request,
// struct inet_diag_msg with attributes the answer for each socket.
const (
	sockDiagByFamily = 20
	requestSize      = 56
	messageSize      = 72
	attrOnly6        = 11 // INET_DIAG_SKV6ONLY
	stateListen      = 10
)

// diag lists sockets through the kernel's socket diagnostics.
type diag struct {
	mu  sync.Mutex
	fd  int
	seq uint32
	buf []byte
}

func openDiag() (*diag, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open socket diagnostics: %w", err)
	}
	// The kernel answers while it is asked; should it ever not, this is an error
	// and not the end of the forwarder.
	limit := unix.Timeval{Sec: 5}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("open socket diagnostics: %w", err)
	}
	d := &diag{fd: fd, buf: make([]byte, 32<<10)}
	if _, _, err := d.listeners(); err != nil {
		d.close()
		return nil, err
	}
	return d, nil
}

func (d *diag) costly() bool { return false }

func (d *diag) close() { unix.Close(d.fd) }

func (d *diag) listeners() (ls []listener, seen int, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	ls, err = d.dump(nil, unix.AF_INET)
	if err != nil {
		return nil, 0, fmt.Errorf("list listening sockets: %w", err)
	}
	ls, err = d.dump(ls, unix.AF_INET6)
	if err != nil && !errors.Is(err, unix.ENOENT) { // no IPv6
		return nil, 0, fmt.Errorf("list listening IPv6 sockets: %w", err)
	}
	return sorted(ls), len(ls), nil
}

// dump appends the listeners of one family.
func (d *diag) dump(ls []listener, family uint8) ([]listener, error) {
	d.seq++
	request := make([]byte, unix.NLMSG_HDRLEN+requestSize)
	binary.NativeEndian.PutUint32(request[0:], uint32(len(request)))
	binary.NativeEndian.PutUint16(request[4:], sockDiagByFamily)
	binary.NativeEndian.PutUint16(request[6:], unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	binary.NativeEndian.PutUint32(request[8:], d.seq)
	body := request[unix.NLMSG_HDRLEN:]
	body[0], body[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(body[4:], 1<<stateListen)
	if err := unix.Sendto(d.fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return nil, err
	}
	for {
		n, _, err := unix.Recvfrom(d.fd, d.buf, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		messages, err := syscall.ParseNetlinkMessage(d.buf[:n])
		if err != nil {
			return nil, err
		}
		for _, m := range messages {
			switch {
			case m.Header.Seq != d.seq: // left from a dump that failed
			case m.Header.Type == unix.NLMSG_DONE:
				return ls, nil
			case m.Header.Type == unix.NLMSG_ERROR:
				return nil, netlinkError(m.Data)
			default:
				if l, ok := parseDiag(m.Data); ok {
					ls = append(ls, l)
				}
			}
		}
	}
}

func netlinkError(data []byte) error {
	if len(data) < 4 {
		return unix.EBADMSG
	}
	errno := -int32(binary.NativeEndian.Uint32(data))
	return os.NewSyscallError("sock_diag", unix.Errno(errno))
}

// parseDiag reads a struct inet_diag_msg: family, state, timer, retransmissions,
// then the ports and addresses of both ends in network order.
func parseDiag(data []byte) (listener, bool) {
	if len(data) < messageSize || data[1] != stateListen {
		return listener{}, false
	}
	var addr netip.Addr
	switch data[0] {
	case unix.AF_INET:
		addr = netip.AddrFrom4([4]byte(data[8:12]))
	case unix.AF_INET6:
		addr = netip.AddrFrom16([16]byte(data[8:24])).Unmap()
	default:
		return listener{}, false
	}
	l := listener{addr: netip.AddrPortFrom(addr, binary.BigEndian.Uint16(data[4:6]))}
	for attrs := data[messageSize:]; len(attrs) >= unix.SizeofNlAttr; {
		size := int(binary.NativeEndian.Uint16(attrs))
		if size < unix.SizeofNlAttr || size > len(attrs) {
			break
		}
		if binary.NativeEndian.Uint16(attrs[2:]) == attrOnly6 && size > unix.SizeofNlAttr {
			l.only6 = attrs[unix.SizeofNlAttr] != 0 && addr.Is6()
		}
		attrs = attrs[min((size+3)&^3, len(attrs)):]
	}
	return l, true
}
