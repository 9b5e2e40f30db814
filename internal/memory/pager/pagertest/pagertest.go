// Package pagertest does with memory what a monitor of virtual machines does, for
// tests and benchmarks: it registers it with userfaultfd and hands it to a pager.
package pagertest

import (
	"encoding/json"
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
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC|unix.O_NONBLOCK, 0, 0)
	if errno != 0 {
		return nil, fmt.Errorf("make userfaultfd: %w", errno)
	}
	m.FD = int(fd)
	api := [3]uint64{apiVersion, features, 0}
	if err := m.ioctl(ioctlAPI, unsafe.Pointer(&api)); err != nil {
		return nil, fmt.Errorf("set up userfaultfd: %w", err)
	}
	reg := [4]uint64{m.base(), uint64(size), modeMissing, 0}
	if err := m.ioctl(ioctlRegister, unsafe.Pointer(&reg)); err != nil {
		return nil, fmt.Errorf("register memory: %w", err)
	}
	return m, nil
}

func (m *Memory) base() uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(m.Bytes)))) }

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
		{m.base(), half, 0, m.page, m.page},
		{m.base() + uint64(half), len(m.Bytes) - half, half, m.page, m.page},
	})
	if err != nil {
		return fmt.Errorf("connect to pager: %w", err)
	}
	if _, _, err := conn.WriteMsgUnix(msg, unix.UnixRights(m.FD), nil); err != nil {
		return fmt.Errorf("hand memory over: %w", err)
	}
	return nil
}

// Copy puts a page in, as a pager does.
func (m *Memory) Copy(offset int, from []byte) error {
	arg := struct {
		dst, src, len, mode uint64
		copied              int64
	}{dst: m.base() + uint64(offset), src: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(from)))), len: uint64(len(from))}
	return m.ioctl(ioctlCopy, unsafe.Pointer(&arg))
}
