package disk

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

func ioctlPtr(fd uintptr, request uint, value *uint64) error {
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, uintptr(request), uintptr(unsafe.Pointer(value)))
	if errno != 0 {
		return errno
	}
	return nil
}
