// Package pagertest does with memory what a monitor of virtual machines does, for
// tests and benchmarks: it registers it with userfaultfd and hands it to a pager.
package pagertest

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	ioctlAPI      = 0xc018aa3f
	ioctlRegister = 0xc020aa00
	ioctlCopy     = 0xc028aa03

	apiVersion   = 0xaa
	features     = 1<<2 | 1<<3 | 1<<6 // events of remap, remove and unmap
	modeMissing  = 1
	hugePageSize = 2 << 20
)

// Memory is memory of this process whose missing pages somebody else puts in.
type Memory struct {
	Bytes []byte
	FD    int // the userfaultfd
	page  int
	at    uint64 // where it is, in its own process
}

// Map makes memory of size bytes, in pages of 4 KiB or huge ones. It stays until
// the process ends.
func Map(size int, huge bool) (*Memory, error) {
	m := &Memory{page: 4096}
	flags := unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	if huge {
		flags |= unix.MAP_HUGETLB
		m.page = hugePageSize
	}
	var err error
	if m.Bytes, err = unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
		return nil, fmt.Errorf("map memory: %w", err)
	}
	m.at = uint64(uintptr(unsafe.Pointer(unsafe.SliceData(m.Bytes))))
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return nil, fmt.Errorf("make userfaultfd: %w", errno)
	}
	m.FD = int(fd)
	api := [3]uint64{apiVersion, features, 0}
	if err := m.ioctl(ioctlAPI, unsafe.Pointer(&api)); err != nil {
		return nil, fmt.Errorf("set up userfaultfd: %w", err)
	}
	reg := [4]uint64{m.at, uint64(size), modeMissing, 0}
	if err := m.ioctl(ioctlRegister, unsafe.Pointer(&reg)); err != nil {
		return nil, fmt.Errorf("register memory: %w", err)
	}
	return m, nil
}

func (m *Memory) ioctl(request uintptr, arg unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(m.FD), request, uintptr(arg)); errno != 0 {
		return errno
	}
	return nil
}

// Connect hands the memory over at a pager's socket, as two regions. The connection
// stays open.
func (m *Memory) Connect(socket string) error {
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("connect to pager: %w", err)
	}
	type region struct {
		Base   uint64 `json:"base_host_virt_addr"`
		Size   int    `json:"size"`
		Offset int    `json:"offset"`
		Page   int    `json:"page_size"`
		Old    int    `json:"page_size_kib"`
	}
	half := len(m.Bytes) / 2 / m.page * m.page
	msg, err := json.Marshal([]region{
		{m.at, half, 0, m.page, m.page},
		{m.at + uint64(half), len(m.Bytes) - half, half, m.page, m.page},
	})
	if err != nil {
		return fmt.Errorf("connect to pager: %w", err)
	}
	if _, _, err := conn.WriteMsgUnix(msg, unix.UnixRights(m.FD), nil); err != nil {
		return fmt.Errorf("hand memory over: %w", err)
	}
	return nil
}

// Serve is a pager with nothing in it but the system calls that one takes: it takes
// memory over from who connects first, and puts in what is touched, in pieces of around
// bytes of from. It goes on until something fails.
func Serve(l *net.UnixListener, from []byte, around int) error {
	conn, err := l.AcceptUnix()
	if err != nil {
		return fmt.Errorf("accept: %w", err)
	}
	buf, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
	if err != nil {
		return fmt.Errorf("take memory over: %w", err)
	}
	var regions []struct {
		Base uint64 `json:"base_host_virt_addr"`
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil || len(messages) != 1 || json.Unmarshal(buf[:n], &regions) != nil || len(regions) == 0 {
		return fmt.Errorf("take memory over: %q makes no sense (%w)", buf[:n], err)
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("take memory over: %d descriptors (%w)", len(fds), err)
	}
	m := Memory{FD: fds[0], at: regions[0].Base}
	return m.serve(from, around)
}

func (m *Memory) serve(from []byte, around int) error {
	var event [32]byte
	poll := []unix.PollFd{{Fd: int32(m.FD), Events: unix.POLLIN}}
	for {
		switch _, err := unix.Read(m.FD, event[:]); {
		case errors.Is(err, unix.EAGAIN):
			if _, err := unix.Poll(poll, -1); err != nil && !errors.Is(err, unix.EINTR) {
				return fmt.Errorf("wait for faults: %w", err)
			}
			continue
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("read userfaultfd: %w", err)
		}
		at := int(binary.NativeEndian.Uint64(event[16:])-m.at) / around * around
		if err := m.Copy(at, from[at:min(at+around, len(from))]); err != nil {
			return fmt.Errorf("put pages in: %w", err)
		}
	}
}

// Copy puts pages in, as a pager does.
func (m *Memory) Copy(offset int, from []byte) error {
	arg := struct {
		dst, src, len, mode uint64
		copied              int64
	}{dst: m.at + uint64(offset), src: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(from)))), len: uint64(len(from))}
	return m.ioctl(ioctlCopy, unsafe.Pointer(&arg))
}
