package process

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// childInfo is what waitid tells about a child. The kernel's structure has the
// pid where x/sys knows only padding: after three numbers, aligned as a pointer.
type childInfo struct {
	header struct {
		numbers [3]int32 // si_signo, si_errno, si_code
		_       [unsafe.Sizeof(uintptr(0)) - 4]byte
		pid     int32
	}
	_ [128]byte
}

func (i *childInfo) siginfo() *unix.Siginfo { return (*unix.Siginfo)(unsafe.Pointer(i)) }

func (i *childInfo) pid() int { return int(i.header.pid) }
