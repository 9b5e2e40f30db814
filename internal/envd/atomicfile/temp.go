package atomicfile

import (
	"crypto/rand"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const tempPrefix = ".envd-tmp-"

// IsTemp reports whether path has the name of a file that is being written.
func IsTemp(path string) bool { return strings.HasPrefix(filepath.Base(path), tempPrefix) }

// TempName returns a name in dir for what is to be renamed once it is complete.
func TempName(dir string) string { return filepath.Join(dir, tempPrefix+rand.Text()) }

// IsNameless reports whether path is what the kernel calls a file that has no
// name yet, when it tells of writes to it: "#" and a number.
func IsNameless(path string) bool {
	digits, ok := strings.CutPrefix(filepath.Base(path), "#")
	if !ok {
		return false
	}
	if _, err := strconv.ParseUint(digits, 10, 64); err != nil {
		return false
	}
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// temp is a file that is being written. Where the file system can it has no
// name meanwhile, so that nothing is left of it even if the agent is killed.
type temp struct {
	file *os.File
	dir  string
	name string // "" while it has none
}

func newTemp(dir string) (*temp, error) {
	f, err := os.OpenFile(dir, os.O_RDWR|unix.O_TMPFILE, 0o666)
	if err == nil {
		if linkable(f) {
			return &temp{file: f, dir: dir}, nil
		}
		f.Close()
	}
	// Not every file system and kernel knows nameless files, and those that do
	// not say so in different ways.
	name := TempName(dir)
	if f, err = os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o666); err != nil {
		return nil, err
	}
	return &temp{file: f, dir: dir, name: name}, nil
}

// linkable reports whether link will work: it needs /proc, or a privilege.
func linkable(f *os.File) bool {
	err := unix.Faccessat(unix.AT_FDCWD, procPath(f), unix.F_OK, 0)
	return err == nil
}

func procPath(f *os.File) string { return "/proc/self/fd/" + strconv.Itoa(int(f.Fd())) }

func (t *temp) link(name string) error {
	err := unix.Linkat(unix.AT_FDCWD, procPath(t.file), unix.AT_FDCWD, name, unix.AT_SYMLINK_FOLLOW)
	if err != nil {
		return &os.LinkError{Op: "link", Old: t.dir, New: name, Err: err}
	}
	return nil
}

// rename gives the file its name. With fresh set there was no file of that name
// when last looked.
func (t *temp) rename(target string, fresh bool) error {
	if t.name == "" {
		if fresh {
			if err := t.link(target); !errors.Is(err, syscall.EEXIST) {
				return err
			}
		}
		// A link cannot replace a file, a rename can.
		name := TempName(t.dir)
		if err := t.link(name); err != nil {
			return err
		}
		t.name = name
	}
	if err := os.Rename(t.name, target); err != nil {
		return err
	}
	t.name = ""
	return nil
}

func (t *temp) discard() {
	t.file.Close()
	if t.name != "" {
		os.Remove(t.name)
	}
}

// announce tells those who watch the directory that the file was written: they
// have seen a name appear, but no write to it. Reserving room that the file has
// counts as one, and changes nothing even if others write to it already.
func announce(f *os.File, target string) {
	ours, err := f.Stat()
	if err != nil || ours.Size() == 0 {
		return
	}
	// The kernel names the file as it was opened, which was without a name.
	named, err := os.OpenFile(target, os.O_WRONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return
	}
	defer named.Close()
	if info, err := named.Stat(); err != nil || !os.SameFile(info, ours) {
		return // replaced already, by somebody who tells of it
	}
	if unix.Fallocate(int(named.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, 1) != nil {
		_ = unix.Ftruncate(int(named.Fd()), ours.Size()) // where one cannot reserve
	}
}
