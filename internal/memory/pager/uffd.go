package pager

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The calls of a userfaultfd.
const (
	ioctlWake         = 0x8010aa02
	ioctlCopy         = 0xc028aa03
	ioctlZeroPage     = 0xc020aa04
	ioctlWriteProtect = 0xc018aa06
)

// What a userfaultfd tells.
const (
	eventPageFault = 0x12
	eventFork      = 0x13
	eventRemap     = 0x14
	eventRemove    = 0x15
	eventUnmap     = 0x16
)

const faultWriteProtect = 1 << 1 // flag of a page fault

const eventSize = 32

// event is one message of a userfaultfd.
type event struct {
	kind    byte
	a, b, c uint64 // the three words that it comes with
}

func decodeEvent(b []byte) event {
	return event{
		kind: b[0],
		a:    binary.NativeEndian.Uint64(b[8:]),
		b:    binary.NativeEndian.Uint64(b[16:]),
		c:    binary.NativeEndian.Uint64(b[24:]),
	}
}

// uffd is another process's userfaultfd.
type uffd struct{ fd int }

func (u uffd) ioctl(request uintptr, arg unsafe.Pointer) error {
	for {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(u.fd), request, uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		default:
			return errno
		}
	}
}

// copy puts pages in and wakes who waits for them. It may do a part only: the
// first n bytes are there then, and the error is about what comes next.
func (u uffd) copy(to uint64, p []byte) (n int, err error) {
	arg := struct {
		dst, src, len, mode uint64
		copied              int64
	}{dst: to, src: uint64(uintptr(unsafe.Pointer(unsafe.SliceData(p)))), len: uint64(len(p))}
	err = u.ioctl(ioctlCopy, unsafe.Pointer(&arg))
	return partial(arg.copied, err)
}

// zero does the same with pages that are zero.
func (u uffd) zero(to uint64, length int) (n int, err error) {
	arg := struct {
		start, len, mode uint64
		zeroed           int64
	}{start: to, len: uint64(length)}
	err = u.ioctl(ioctlZeroPage, unsafe.Pointer(&arg))
	return partial(arg.zeroed, err)
}

// partial reads what a call says that has done a part: that much, as EAGAIN.
func partial(done int64, err error) (int, error) {
	if err == nil || errors.Is(err, unix.EAGAIN) {
		return int(max(done, 0)), err
	}
	return 0, err
}

// wake lets who waits for a page look again.
func (u uffd) wake(at uint64, length int) error {
	arg := [2]uint64{at, uint64(length)}
	return u.ioctl(ioctlWake, unsafe.Pointer(&arg))
}

// unprotect lets a page be written that was protected.
func (u uffd) unprotect(at uint64, length int) error {
	arg := [3]uint64{at, uint64(length), 0}
	return u.ioctl(ioctlWriteProtect, unsafe.Pointer(&arg))
}

// setup makes a descriptor that came from elsewhere one that is read without waiting.
// Who hands it over is not trusted: events that somebody makes up would have the
// pager act on descriptors that it has for others.
func setup(fd int) error {
	if kind, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd)); err != nil || kind != "anon_inode:[userfaultfd]" {
		return fmt.Errorf("it is no userfaultfd but %s", kind)
	}
	return unix.SetNonblock(fd, true)
}
