package disk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// minXFS is the smallest file system that mkfs.xfs makes.
const minXFS = 300 << 20

// Mount makes sure that files below dir can share blocks. Where dir's file system
// cannot do it, an XFS of size bytes in the sparse file is mounted there; it takes
// room on the host only for what it holds. What an earlier process made is found
// and used as it is: the size counts when the file is made.
func Mount(ctx context.Context, dir, file string, size int64) error {
	if err := mount(ctx, dir, file, size); err != nil {
		return fmt.Errorf("set up a file system with reflinks at %s: %w", dir, Full(err))
	}
	return nil
}

func mount(ctx context.Context, dir, file string, size int64) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if ok, err := HoldsReflinks(dir); ok || err != nil {
		return err
	}
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		if err := makeXFS(ctx, file, size); err != nil {
			return err
		}
	} else if err != nil {
		return err
	}
	loop, err := attach(file)
	if err != nil {
		return err
	}
	defer loop.Close() // from the mount on, that keeps it
	if err := unix.Mount(loop.Name(), dir, "xfs", unix.MS_NOATIME|unix.MS_NODEV|unix.MS_NOSUID, "discard"); err != nil {
		return fmt.Errorf("mount %s: %w", file, err)
	}
	ok, err := HoldsReflinks(dir)
	if err == nil && !ok {
		err = fmt.Errorf("%s holds an XFS without reflinks: remove it", file)
	}
	if err != nil {
		return errors.Join(err, unix.Unmount(dir, unix.MNT_DETACH))
	}
	return nil
}

// Mounted says whether the file system at dir is the one in the file, and no other that
// somebody has mounted there.
func Mounted(dir, file string) (bool, error) {
	mounted, err := mounted(dir, file)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("look at what is mounted at %s: %w", dir, err)
	}
	return mounted, nil
}

func mounted(dir, file string) (bool, error) {
	var at, device unix.Stat_t
	if err := unix.Stat(dir, &at); err != nil {
		return false, err
	}
	backing, err := os.Open(file)
	if err != nil {
		return false, err
	}
	defer backing.Close()
	loop, err := attached(backing)
	if loop == nil || err != nil {
		return false, err
	}
	defer loop.Close()
	err = unix.Fstat(int(loop.Fd()), &device)
	return err == nil && at.Dev == device.Rdev, err
}

// Unmount undoes Mount, and touches nothing else that is mounted there; the file stays.
// What is in use stays until it is not. It is idempotent.
func Unmount(dir, file string) error {
	ours, err := Mounted(dir, file)
	if err != nil || !ours {
		return err
	}
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		return fmt.Errorf("unmount %s: %w", dir, err)
	}
	return nil
}

// makeXFS makes the file with an empty file system in it.
func makeXFS(ctx context.Context, file string, size int64) error {
	if size < minXFS {
		return fmt.Errorf("%d MiB are too small for it: it takes %d", size>>20, minXFS>>20)
	}
	mkfs, err := findProgram("mkfs.xfs", "xfsprogs")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	out, err := os.CreateTemp(filepath.Dir(file), ".xfs-")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	if err := errors.Join(out.Truncate(size), out.Close()); err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-K", "-s", "size=4096", "-m", "reflink=1", out.Name())
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	if said, err := cmd.CombinedOutput(); err != nil {
		if bytes.Contains(said, []byte("No space left on device")) {
			return unix.ENOSPC
		}
		return fmt.Errorf("mkfs.xfs: %w: %s", err, bytes.TrimSpace(said))
	}
	if err := syncFile(out.Name()); err != nil {
		return err
	}
	return os.Rename(out.Name(), file)
}

// attach makes a loop device of the file, which goes when nothing has it open or
// mounted any more: so a process killed in between leaves none. One that is there
// is taken: what was unmounted goes on for as long as somebody uses it, and two
// devices of one file would each write what it thinks is right.
func attach(file string) (*os.File, error) {
	backing, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	if loop, err := attached(backing); loop != nil || err != nil {
		return loop, err
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("%w: the kernel has no loop devices (modprobe loop); or put the data directory on XFS or Btrfs", err)
	}
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("find a free loop device: %w", err)
		}
		loop, err := os.OpenFile("/dev/loop"+strconv.Itoa(n), os.O_RDWR, 0)
		if err != nil {
			return nil, err
		}
		err = configure(loop, backing)
		if err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) { // else another process was faster
			return nil, fmt.Errorf("set up %s: %w", loop.Name(), err)
		}
	}
}

// attached finds the loop device that the file has, and opens it, so that it stays.
// It is nil where there is none.
func attached(backing *os.File) (*os.File, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(backing.Fd()), &st); err != nil {
		return nil, err
	}
	found, err := filepath.Glob("/sys/block/loop*/loop") // there while the device has a file
	if err != nil {
		return nil, err
	}
	for _, path := range found {
		loop, err := os.OpenFile(filepath.Join("/dev", filepath.Base(filepath.Dir(path))), os.O_RDWR, 0)
		if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) || errors.Is(err, unix.ENOMEM) {
			return nil, err
		}
		if err != nil {
			continue // it is somebody else's, and may go at any time
		}
		info, err := unix.IoctlLoopGetStatus64(int(loop.Fd()))
		if err == nil && info.Inode == st.Ino && info.Device == st.Dev {
			return loop, nil
		}
		loop.Close()
	}
	return nil, nil
}

// configure gives the loop device its file, past the page cache where the file's
// file system can do that: else everything would be cached twice.
func configure(loop, backing *os.File) error {
	config := unix.LoopConfig{Fd: uint32(backing.Fd()), Size: blockSize}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	copy(config.Info.File_name[:len(config.Info.File_name)-1], backing.Name())
	err := unix.IoctlLoopConfigure(int(loop.Fd()), &config)
	if errors.Is(err, unix.EINVAL) {
		config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
	}
	return err
}
