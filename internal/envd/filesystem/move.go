package filesystem

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd/atomicfile"
)

// move gives what is at source the name destination, on another file system by
// copying it. Unless it succeeds source is whole and destination as it was.
func move(ctx context.Context, source, destination string) error {
	if source == destination {
		return nil
	}
	if strings.HasPrefix(destination, strings.TrimSuffix(source, "/")+"/") {
		return &os.LinkError{Op: "move", Old: source, New: destination, Err: syscall.EINVAL}
	}
	err := os.Rename(source, destination)
	if !errors.Is(err, syscall.EXDEV) {
		return err
	}
	if point := mountAt(source); point != "" {
		return fmt.Errorf("%s is a mount point: %w", point, syscall.EBUSY)
	}
	// Looked at before all is copied for nothing.
	if err := replaceable(source, destination); err != nil {
		return err
	}
	temp := atomicfile.TempName(filepath.Dir(destination))
	if err := copyTree(ctx, source, temp); err != nil {
		return errors.Join(err, os.RemoveAll(temp))
	}
	if err := os.Rename(temp, destination); err != nil {
		return errors.Join(err, os.RemoveAll(temp))
	}
	if err := os.RemoveAll(source); err != nil {
		return fmt.Errorf("moved to %s, but not all of the source could be removed: %w", destination, err)
	}
	return nil
}

func replaceable(source, destination string) error {
	from, err := os.Lstat(source)
	if err != nil {
		return err
	}
	to, err := os.Lstat(destination)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	case to.IsDir():
		return &os.LinkError{Op: "move", Old: source, New: destination, Err: syscall.EEXIST}
	case from.IsDir():
		return &os.LinkError{Op: "move", Old: source, New: destination, Err: syscall.ENOTDIR}
	}
	return nil
}

// copyTree copies what is at source to target, which is not there yet, with its
// modes, owners, times, attributes, links and holes, and sees it on disk.
func copyTree(ctx context.Context, source, target string) error {
	c := copier{ctx: ctx, links: make(map[fileID]string)}
	if err := c.copy(source, target); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(target))
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Syncfs(int(dir.Fd()))
}

type fileID struct{ dev, ino uint64 }

type copier struct {
	ctx   context.Context
	links map[fileID]string // copies of files that have several names
	top   fileID            // the directory that is made of the source, if it is one
}

func (c *copier) copy(source, target string) error {
	if err := c.ctx.Err(); err != nil {
		return err
	}
	var stat unix.Stat_t
	if err := unix.Lstat(source, &stat); err != nil {
		return &fs.PathError{Op: "lstat", Path: source, Err: err}
	}
	id := fileID{uint64(stat.Dev), stat.Ino} //nolint:unconvert // not an uint64 on every architecture
	isDir := stat.Mode&unix.S_IFMT == unix.S_IFDIR
	if isDir && id == c.top { // by way of a mount the target lies in the source
		return &os.LinkError{Op: "move", Old: source, New: target, Err: syscall.EINVAL}
	}
	if !isDir && stat.Nlink > 1 {
		if first, ok := c.links[id]; ok {
			return os.Link(first, target)
		}
		c.links[id] = target
	}
	var err error
	switch stat.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		err = c.copyDir(source, target)
	case unix.S_IFREG:
		err = c.copyFile(source, target, stat.Size)
	case unix.S_IFLNK:
		var link string
		if link, err = os.Readlink(source); err == nil {
			err = os.Symlink(link, target)
		}
	default: // devices, pipes and sockets
		if err = unix.Mknod(target, stat.Mode&unix.S_IFMT|0o600, int(stat.Rdev)); err != nil { //nolint:gosec // the kernel's own number
			err = &fs.PathError{Op: "mknod", Path: target, Err: err}
		}
	}
	if err != nil {
		return err
	}
	return copyAttributes(source, target, &stat)
}

func (c *copier) copyDir(source, target string) error {
	if err := os.Mkdir(target, 0o700); err != nil {
		return err
	}
	if c.top == (fileID{}) {
		var stat unix.Stat_t
		if err := unix.Lstat(target, &stat); err != nil {
			return &fs.PathError{Op: "lstat", Path: target, Err: err}
		}
		c.top = fileID{uint64(stat.Dev), stat.Ino} //nolint:unconvert // as above
	}
	children, err := os.ReadDir(source)
	if err != nil {
		return err
	}
	for _, child := range children {
		if err := c.copy(filepath.Join(source, child.Name()), filepath.Join(target, child.Name())); err != nil {
			return err
		}
	}
	return nil
}

func (c *copier) copyFile(source, target string, size int64) error {
	from, err := os.OpenFile(source, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := os.OpenFile(target, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer to.Close()
	for at := int64(0); at < size; {
		start, end := nextData(from, at, size)
		if at, err = c.copyRange(from, to, start, end); err != nil {
			return err
		}
		if at < end {
			break // cut short meanwhile
		}
	}
	if info, err := from.Stat(); err == nil {
		size = min(size, info.Size())
	}
	if err := to.Truncate(size); err != nil { // a hole may be at the end
		return err
	}
	return to.Close()
}

// nextData returns where the next bytes of f from at on are that are no hole.
func nextData(f *os.File, at, size int64) (start, end int64) {
	start, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size
	} else if err != nil || start < at {
		return at, size // not known here: all may be data
	}
	end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	if err != nil || end <= start {
		end = size
	}
	return min(start, size), min(end, size)
}

func (c *copier) copyRange(from, to *os.File, at, end int64) (int64, error) {
	if _, err := from.Seek(at, 0); err != nil {
		return at, err
	}
	if _, err := to.Seek(at, 0); err != nil {
		return at, err
	}
	for at < end {
		if err := c.ctx.Err(); err != nil {
			return at, err
		}
		n, err := atomicfile.Append(to, from, min(end-at, 64<<20))
		at += n
		if err != nil || n == 0 {
			return at, err
		}
	}
	return at, nil
}

func copyAttributes(source, target string, stat *unix.Stat_t) error {
	if err := os.Lchown(target, int(stat.Uid), int(stat.Gid)); err != nil {
		return err
	}
	if err := copyXattrs(source, target); err != nil {
		return err
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFLNK { // after the owner, whose change takes setuid away
		if err := unix.Chmod(target, stat.Mode&0o7777); err != nil {
			return &fs.PathError{Op: "chmod", Path: target, Err: err}
		}
	}
	times := []unix.Timespec{stat.Atim, stat.Mtim}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, target, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &fs.PathError{Op: "utimensat", Path: target, Err: err}
	}
	return nil
}

// copyXattrs copies the extended attributes that the target can hold.
func copyXattrs(source, target string) error {
	size, err := unix.Llistxattr(source, nil)
	if err != nil || size == 0 {
		return nil // a file system without them
	}
	names := make([]byte, size)
	if size, err = unix.Llistxattr(source, names); err != nil {
		return &fs.PathError{Op: "listxattr", Path: source, Err: err}
	}
	value := make([]byte, 64<<10) // the kernel's limit
	for name := range strings.SplitSeq(strings.TrimRight(string(names[:size]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(source, name, value)
		if err != nil {
			continue // removed meanwhile, or not for us to read
		}
		err = unix.Lsetxattr(target, name, value[:n], 0)
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.EPERM) {
			return &fs.PathError{Op: "setxattr", Path: target, Err: err}
		}
	}
	return nil
}
