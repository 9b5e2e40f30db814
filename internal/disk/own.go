package disk

import (
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// fiemap is the kernel's struct fiemap with room for a batch of extents (include
// linux/fiemap.h).
type fiemap struct {
	start, length uint64
	flags, mapped uint32
	count, _      uint32
	extents       [fiemapBatch]fiemapExtent
}

type fiemapExtent struct {
	logical, physical, length uint64
	_                         [2]uint64
	flags                     uint32
	_                         [3]uint32
}

const (
	fiemapBatch  = 128
	fsIOCFiemap  = 0xc020660b // FS_IOC_FIEMAP
	extentLast   = 0x1        // FIEMAP_EXTENT_LAST
	extentShared = 0x2000     // FIEMAP_EXTENT_SHARED
)

// OwnBytes is what would become free were the file removed: the blocks that it shares
// with no other file. It counts what has been written through to the disk. A file
// system that does not tell shared blocks apart counts all.
func OwnBytes(path string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var own int64
	for at := uint64(0); ; {
		m := fiemap{start: at, length: ^uint64(0) - at, count: fiemapBatch}
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fsIOCFiemap, uintptr(unsafe.Pointer(&m)))
		if errors.Is(errno, unix.EOPNOTSUPP) || errors.Is(errno, unix.ENOTTY) { // tmpfs
			var st unix.Stat_t
			if err := unix.Fstat(int(f.Fd()), &st); err != nil {
				return 0, fmt.Errorf("measure %s: %w", path, err)
			}
			return st.Blocks * 512, nil
		}
		if errno != 0 {
			return 0, fmt.Errorf("measure %s: %w", path, errno)
		}
		for _, e := range m.extents[:m.mapped] {
			if e.flags&extentShared == 0 {
				own += int64(e.length)
			}
			if at = e.logical + e.length; e.flags&extentLast != 0 {
				return own, nil
			}
		}
		if m.mapped == 0 {
			return own, nil
		}
	}
}
