package machine

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// MaxEntropy bounds what one Reseed takes, in bytes.
const MaxEntropy = 4096

// Reseed gives the kernel random bytes that nobody else has, and makes it use
// them from now on: copies of one memory image would otherwise draw the same
// numbers. A kernel that has no such call (it draws from the host) needs none.
func Reseed(entropy []byte) error {
	if len(entropy) == 0 || len(entropy) > MaxEntropy {
		return nil
	}
	fd, err := unix.Open("/dev/urandom", unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return quiet(fmt.Errorf("open random device: %w", err))
	}
	defer unix.Close(fd)
	// struct rand_pool_info: bits of entropy, size in bytes, the bytes.
	request := make([]byte, 8+len(entropy))
	binary.NativeEndian.PutUint32(request, uint32(len(entropy)*8))
	binary.NativeEndian.PutUint32(request[4:], uint32(len(entropy)))
	copy(request[8:], entropy)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&request[0])))
	if errno != 0 {
		return quiet(fmt.Errorf("add entropy: %w", errno))
	}
	_, _, errno = unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.RNDRESEEDCRNG, 0)
	if errno != 0 {
		return quiet(fmt.Errorf("reseed: %w", errno))
	}
	return nil
}

// quiet drops errors that say that the kernel has no such call, or does not let
// this process make it.
func quiet(err error) error {
	for _, expected := range []error{unix.ENOTTY, unix.EINVAL, unix.ENOSYS, unix.EPERM, unix.EACCES, unix.ENOENT} {
		if errors.Is(err, expected) {
			return nil
		}
	}
	return err
}
