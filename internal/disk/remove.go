package disk

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// RemoveAll removes path and everything below it, as os.RemoveAll does, with three
// descriptors however deep that is: whoever made it may have meant to use up those of who
// removes it. Nobody else may write there meanwhile.
func RemoveAll(path string) error {
	err := os.Remove(path)
	if err == nil || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	fd, oerr := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if oerr != nil {
		return err
	}
	r := remover{top: os.NewFile(uintptr(fd), path)}
	err = each(r.top, r.remove)
	r.top.Close()
	if err != nil {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return os.Remove(path)
}

// remover empties a directory. What is below the directories in it comes up into it.
type remover struct {
	top  *os.File
	next int // number of a directory that comes up
}

// each calls f for what is in the directory until there is nothing left.
func each(dir *os.File, f func(name string) error) error {
	const some = 1024
	for {
		if _, err := dir.Seek(0, io.SeekStart); err != nil {
			return err
		}
		names, err := dir.Readdirnames(some)
		if len(names) == 0 {
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		}
		for _, name := range names {
			if err := f(name); err != nil {
				return err
			}
		}
	}
}

func (r *remover) remove(name string) error {
	err := unlink(r.top, name)
	if !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	fd, err := unix.Openat(int(r.top.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	dir := os.NewFile(uintptr(fd), name)
	defer dir.Close()
	err = each(dir, func(below string) error {
		err := unlink(dir, below)
		if errors.Is(err, unix.ENOTEMPTY) {
			err = r.lift(dir, below)
		}
		return err
	})
	if err != nil {
		return err
	}
	return unlink(r.top, name)
}

// lift moves a directory up to the top.
func (r *remover) lift(dir *os.File, name string) error {
	for {
		r.next++
		to := fmt.Sprint("up", r.next)
		err := unix.Renameat2(int(dir.Fd()), name, int(r.top.Fd()), to, unix.RENAME_NOREPLACE)
		if errors.Is(err, unix.EINVAL) { // of a file system that has no such thing
			var st unix.Stat_t
			if unix.Fstatat(int(r.top.Fd()), to, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
				continue
			}
			err = unix.Renameat(int(dir.Fd()), name, int(r.top.Fd()), to)
		}
		if !errors.Is(err, unix.EEXIST) {
			return err
		}
	}
}

// unlink removes a file or an empty directory.
func unlink(dir *os.File, name string) error {
	err := unix.Unlinkat(int(dir.Fd()), name, 0)
	if errors.Is(err, unix.EISDIR) {
		err = unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR)
	}
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}
