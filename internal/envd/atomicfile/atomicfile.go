// Package atomicfile replaces files so that nobody ever sees half of one: the
// new content is complete and on disk before it takes the old one's name.
package atomicfile

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ErrSpecial is the kind of the error about files that cannot be written over:
// named pipes and sockets, which would wait for somebody to read.
var ErrSpecial = errors.New("is a named pipe or a socket")

// Options of Write.
type Options struct {
	UID, GID int
	// Size is how many bytes are to come, 0 when that is not known. With it a
	// disk that has no room for them is noticed before any is written.
	Size int64
	// Finish is called on the complete file before it gets its name; may be nil.
	Finish func(*os.File) error
}

// Write makes path hold what fill writes. A file that is there keeps its mode
// and is replaced; links are followed; a new one gets mode 0666 less the umask.
// Devices, and files that cannot be replaced because something is mounted on
// them, are written in place. On failure path is as it was.
func Write(path string, o Options, fill func(io.Writer) error) error {
	target, old, err := resolve(path)
	if err != nil {
		return err
	}
	switch {
	case old == nil:
	case old.IsDir():
		return &fs.PathError{Op: "write", Path: path, Err: syscall.EISDIR}
	case old.Mode()&(fs.ModeNamedPipe|fs.ModeSocket) != 0:
		return &fs.PathError{Op: "write", Path: path, Err: ErrSpecial}
	case !old.Mode().IsRegular():
		return writeInPlace(target, fill)
	}
	t, err := newTemp(filepath.Dir(target))
	if err != nil {
		return err
	}
	defer t.discard()
	if err := complete(t.file, o, old, fill); err != nil {
		return err
	}
	err = t.rename(target, old == nil)
	if errors.Is(err, syscall.EBUSY) {
		return copyInPlace(t.file, target)
	}
	if err == nil {
		announce(t.file, target)
	}
	return err
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
			// What ".." in the link means depends on where its directory really is.
			dir, err := filepath.EvalSymlinks(filepath.Dir(target))
			if err != nil {
				return "", nil, err
			}
			link = filepath.Join(dir, link)
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
	if err := reserve(f, o.Size); err != nil {
		return err
	}
	if err := fill(&sink{file: f}); err != nil {
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

func writeInPlace(target string, fill func(io.Writer) error) error {
	f, err := os.OpenFile(target, os.O_WRONLY|os.O_TRUNC|syscall.O_NOCTTY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := fill(&sink{file: f}); err != nil {
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
