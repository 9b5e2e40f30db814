// Package atomicfile replaces files so that nobody ever sees half of one: the
// new content is complete and on disk before it takes the old one's name.
package atomicfile

import (
	"bufio"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const tempPrefix = ".envd-tmp-"

// IsTemp reports whether name is that of a file being written.
func IsTemp(name string) bool { return strings.HasPrefix(filepath.Base(name), tempPrefix) }

// Options of Write.
type Options struct {
	UID, GID int
	// Finish is called on the complete file before it gets its name; may be nil.
	Finish func(*os.File) error
}

// Write makes path hold what fill writes. A file that is there keeps its mode
// and is replaced; links are followed; a new one gets mode 0666 less the umask.
// What is not a regular file, or cannot be replaced because something is mounted
// on it, is written in place. On failure path is as it was.
func Write(path string, o Options, fill func(io.Writer) error) error {
	target, info, err := resolve(path)
	if err != nil {
		return err
	}
	switch {
	case info == nil:
	case info.IsDir():
		return &fs.PathError{Op: "write", Path: path, Err: syscall.EISDIR}
	case !info.Mode().IsRegular():
		return writeInPlace(target, fill)
	}
	temp := filepath.Join(filepath.Dir(target), tempPrefix+rand.Text())
	f, err := os.OpenFile(temp, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := complete(f, o, info, fill); err != nil {
		os.Remove(temp)
		return err
	}
	if err := os.Rename(temp, target); err != nil {
		defer os.Remove(temp)
		if errors.Is(err, syscall.EBUSY) {
			return copyInPlace(f, target)
		}
		return err
	}
	announce(f)
	return nil
}

// resolve follows path to the file that is to be written; info is nil when there
// is none yet.
func resolve(path string) (target string, info fs.FileInfo, err error) {
	target = path
	// Links may point to a file that does not exist yet.
	for range 40 {
		link, err := os.Readlink(target)
		if err != nil {
			break
		}
		if !filepath.IsAbs(link) {
			link = filepath.Join(filepath.Dir(target), link)
		}
		target = link
	}
	info, err = os.Stat(target)
	if errors.Is(err, fs.ErrNotExist) {
		return target, nil, nil
	}
	return target, info, err
}

func complete(f *os.File, o Options, old fs.FileInfo, fill func(io.Writer) error) error {
	if err := fillBuffered(f, fill); err != nil {
		return err
	}
	if err := f.Chown(o.UID, o.GID); err != nil {
		return fmt.Errorf("change owner: %w", err)
	}
	if old != nil {
		if err := f.Chmod(old.Mode().Perm()); err != nil {
			return fmt.Errorf("keep mode: %w", err)
		}
	}
	if o.Finish != nil {
		if err := o.Finish(f); err != nil {
			return err
		}
	}
	return f.Sync()
}

func fillBuffered(f *os.File, fill func(io.Writer) error) error {
	w := bufio.NewWriterSize(f, 256<<10)
	if err := fill(w); err != nil {
		return err
	}
	return w.Flush()
}

// announce tells those who watch the directory that the file was written: they
// have seen a name appear, but no write to it. Setting a file's size, to what it
// is, counts as one.
func announce(f *os.File) {
	if info, err := f.Stat(); err == nil {
		_ = unix.Ftruncate(int(f.Fd()), info.Size())
	}
}

func writeInPlace(target string, fill func(io.Writer) error) error {
	f, err := os.OpenFile(target, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fillBuffered(f, fill); err != nil {
		return err
	}
	return f.Close()
}

func copyInPlace(from *os.File, target string) error {
	if _, err := from.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return writeInPlace(target, func(w io.Writer) error {
		_, err := io.Copy(w, from)
		return err
	})
}

// MakeDirs makes the directory path and its missing parents, mode 0755 and
// owned by uid and gid.
func MakeDirs(path string, uid, gid int) error {
	info, err := os.Stat(path)
	if err == nil {
		if !info.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := MakeDirs(filepath.Dir(path), uid, gid); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		if info, statErr := os.Stat(path); statErr == nil && info.IsDir() {
			return nil // somebody else made it meanwhile
		}
		return err
	}
	return os.Chown(path, uid, gid)
}
