package filesystem

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	rpc "github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/envd/atomicfile"
)

var (
	// errOverflow says that changes came faster than they were read, and some are
	// not known.
	errOverflow = errors.New("events were lost: the directory changes faster than its events are read")
	// errLimit says that the kernel watches as much as it is allowed to.
	errLimit = errors.New("too many directories are watched: the kernel's limit is in /proc/sys/fs/inotify")
	// errRootGone says that the watched directory itself was removed or moved.
	errRootGone = fmt.Errorf("the watched directory is gone: %w", fs.ErrNotExist)
)

const (
	watchMask = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_MODIFY | unix.IN_ATTRIB |
		unix.IN_DELETE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	eventHeader = unix.SizeofInotifyEvent
)

// change is something that happened in a watched directory.
type change struct {
	path string
	kind rpc.EventType
}

// watch follows one directory, on request with all below it. It is used by one
// goroutine; only Close may come from another.
type watch struct {
	file      *os.File
	conn      syscall.RawConn // of file
	root      string
	rootID    int32 // its watch descriptor
	recursive bool
	dirs      map[int32]string // by watch descriptor

	// arrived is where the last event moved something to.
	arrived string
	// announced holds what was found by looking into a new directory while
	// events from before may wait still: one of its creation is then no news.
	announced map[string]struct{}
	// caughtUp is called when no event waits; may be nil.
	caughtUp func()
}

func newWatch(ctx context.Context, root string, recursive bool) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
		return nil, errLimit
	} else if err != nil {
		return nil, fmt.Errorf("start watching: %w", err)
	}
	w := &watch{
		file: os.NewFile(uintptr(fd), "inotify"), root: root, recursive: recursive,
		dirs: make(map[int32]string), announced: make(map[string]struct{}),
	}
	if w.conn, err = w.file.SyscallConn(); err != nil {
		w.Close()
		return nil, fmt.Errorf("start watching: %w", err)
	}
	if w.rootID, err = w.add(root, 0); err != nil {
		w.Close()
		return nil, err
	}
	if recursive {
		if err := w.addBelow(ctx, root, nil); err != nil {
			w.Close()
			return nil, err
		}
	}
	return w, nil
}

// Close ends run.
func (w *watch) Close() { w.file.Close() }

// run calls emit for every change, in order, until ctx ends, emit fails, events
// were lost or the watched directory is gone.
func (w *watch) run(ctx context.Context, emit func(change) error) error {
	stop := context.AfterFunc(ctx, w.Close)
	defer stop()
	buf := make([]byte, 16<<10)
	for {
		n, err := w.read(buf)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("read events: %w", err)
		}
		err = parseEvents(buf[:n], func(wd int32, mask uint32, name string) error {
			return w.handle(ctx, wd, mask, name, emit)
		})
		if ctx.Err() != nil {
			return ctx.Err()
		} else if err != nil {
			return err
		}
	}
}

// read waits for events.
func (w *watch) read(buf []byte) (n int, err error) {
	waitErr := w.conn.Read(func(fd uintptr) bool {
		for {
			n, err = unix.Read(int(fd), buf)
			switch {
			case errors.Is(err, unix.EINTR):
				continue
			case errors.Is(err, unix.EAGAIN):
				clear(w.announced)
				if w.caughtUp != nil {
					w.caughtUp()
				}
				return false
			}
			return true
		}
	})
	if waitErr != nil {
		return 0, waitErr
	}
	return max(n, 0), err
}

// parseEvents calls each for every event that the kernel wrote into buf.
func parseEvents(buf []byte, each func(wd int32, mask uint32, name string) error) error {
	for len(buf) >= eventHeader {
		wd, mask := int32(binary.NativeEndian.Uint32(buf)), binary.NativeEndian.Uint32(buf[4:])
		length := uint64(binary.NativeEndian.Uint32(buf[12:]))
		if length > uint64(len(buf)-eventHeader) {
			break
		}
		name, rest := buf[eventHeader:eventHeader+length], buf[eventHeader+length:]
		if err := each(wd, mask, string(bytes.TrimRight(name, "\x00"))); err != nil {
			return err
		}
		buf = rest
	}
	if len(buf) > 0 {
		return errors.New("the kernel gave half an event")
	}
	return nil
}

func (w *watch) handle(ctx context.Context, wd int32, mask uint32, name string, emit func(change) error) error {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		return errOverflow
	}
	dir, known := w.dirs[wd]
	if wd == w.rootID && mask&(unix.IN_UNMOUNT|unix.IN_DELETE_SELF|unix.IN_MOVE_SELF) != 0 {
		return w.rootGone(mask, emit)
	}
	if mask&unix.IN_IGNORED != 0 {
		delete(w.dirs, wd)
		return nil
	}
	if !known || atomicfile.IsTemp(name) || strings.Contains(name, "/") {
		return nil
	}
	if name == "" && dir != w.root {
		return nil // its parent is watched too and tells the same
	}
	path := filepath.Join(dir, name)
	swapped := w.swapped(path, mask)
	if mask&(unix.IN_MODIFY|unix.IN_ATTRIB) != 0 && atomicfile.IsNameless(path) {
		return nil
	}
	if mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0 {
		if err := w.created(ctx, path, mask, emit); err != nil {
			return err
		}
	}
	if mask&(unix.IN_MOVED_FROM|unix.IN_DELETE) != 0 {
		w.forget(path, mask)
	}
	// The kernel tells one thing at a time; should it tell more, this is their order.
	for _, e := range []struct {
		mask uint32
		kind rpc.EventType
	}{
		{unix.IN_MOVED_FROM, rpc.EventType_EVENT_TYPE_RENAME},
		{unix.IN_ATTRIB, rpc.EventType_EVENT_TYPE_CHMOD},
		{unix.IN_MODIFY, rpc.EventType_EVENT_TYPE_WRITE},
		{unix.IN_DELETE, rpc.EventType_EVENT_TYPE_REMOVE},
	} {
		if mask&e.mask != 0 {
			if err := emit(change{path, e.kind}); err != nil {
				return err
			}
		}
	}
	if swapped {
		return w.stillThere(ctx, path, emit)
	}
	return nil
}

// swapped reports whether an event may be of two names that were swapped. The
// kernel tells of them as two moves, and the second one's start takes nothing
// away of what the first one has brought.
func (w *watch) swapped(path string, mask uint32) bool {
	may := mask&unix.IN_MOVED_FROM != 0 && path == w.arrived
	w.arrived = ""
	if mask&unix.IN_MOVED_TO != 0 {
		w.arrived = path
	}
	return may
}

// stillThere tells of what is at path although an event says that it was moved
// away.
func (w *watch) stillThere(ctx context.Context, path string, emit func(change) error) error {
	info, err := os.Lstat(path)
	if err != nil {
		return ignoreUnreachable(err)
	}
	mask := uint32(unix.IN_MOVED_TO)
	if info.IsDir() {
		mask |= unix.IN_ISDIR
	}
	err = w.created(ctx, path, mask, emit)
	w.announced[path] = struct{}{} // should it be new, and not what had been swapped
	return err
}

// rootGone tells the last event: no others can come, and what is at the path
// from now on is another directory.
func (w *watch) rootGone(mask uint32, emit func(change) error) error {
	kind := rpc.EventType_EVENT_TYPE_REMOVE
	if mask&unix.IN_MOVE_SELF != 0 {
		kind = rpc.EventType_EVENT_TYPE_RENAME
	}
	if err := emit(change{w.root, kind}); err != nil {
		return err
	}
	return errRootGone
}

func (w *watch) created(ctx context.Context, path string, mask uint32, emit func(change) error) error {
	// What was moved here may have replaced what was found: that is news.
	if _, known := w.announced[path]; known && mask&unix.IN_MOVED_TO == 0 {
		delete(w.announced, path)
		return nil
	}
	if err := emit(change{path, rpc.EventType_EVENT_TYPE_CREATE}); err != nil {
		return err
	}
	if mask&unix.IN_ISDIR == 0 || !w.recursive {
		return nil
	}
	_, err := w.add(path, unix.IN_DONT_FOLLOW)
	if err == nil {
		// What was made in it before it was watched gave no events.
		err = w.addBelow(ctx, path, emit)
	}
	if err = ignoreUnreachable(err); err != nil {
		return err
	}
	// If a directory above the root was moved the path led nowhere or elsewhere,
	// of which there is no event.
	if id, err := w.add(w.root, 0); err != nil && ignoreUnreachable(err) != nil {
		return err
	} else if err != nil || id != w.rootID {
		return w.rootGone(unix.IN_MOVE_SELF, emit)
	}
	return nil
}

// addBelow watches the directories below dir. With emit it reports everything it
// finds as created.
func (w *watch) addBelow(ctx context.Context, dir string, emit func(change) error) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	children, err := os.ReadDir(dir)
	if err != nil {
		return ignoreUnreachable(err)
	}
	for _, child := range children {
		path := filepath.Join(dir, child.Name())
		if atomicfile.IsTemp(path) {
			continue // it comes under its own name
		}
		if emit != nil {
			if err := w.announce(path, child, emit); err != nil {
				return err
			}
		}
		if !child.IsDir() {
			continue
		}
		if _, err := w.add(path, unix.IN_DONT_FOLLOW); err != nil {
			if ignoreUnreachable(err) == nil {
				continue
			}
			return err
		}
		if err := w.addBelow(ctx, path, emit); err != nil {
			return err
		}
	}
	return nil
}

func (w *watch) announce(path string, child fs.DirEntry, emit func(change) error) error {
	if _, done := w.announced[path]; done {
		return nil
	}
	w.announced[path] = struct{}{}
	if err := emit(change{path, rpc.EventType_EVENT_TYPE_CREATE}); err != nil {
		return err
	}
	if info, err := child.Info(); err == nil && info.Mode().IsRegular() && info.Size() > 0 {
		return emit(change{path, rpc.EventType_EVENT_TYPE_WRITE})
	}
	return nil
}

// add watches dir. The descriptor it returns is the same for the same directory.
func (w *watch) add(dir string, flags uint32) (id int32, err error) {
	closed := w.conn.Control(func(fd uintptr) {
		var wd int
		wd, err = unix.InotifyAddWatch(int(fd), dir, watchMask|flags)
		id = int32(wd)
	})
	switch err = errors.Join(closed, err); {
	case errors.Is(err, unix.ENOSPC):
		return 0, errLimit
	case err != nil:
		return 0, &fs.PathError{Op: "watch", Path: dir, Err: err}
	}
	w.dirs[id] = dir
	return id, nil
}

// forget takes back that path was announced. When it is a directory that was
// moved away its watches go too, for their paths are no longer true; should it
// come back it is watched anew.
func (w *watch) forget(path string, mask uint32) {
	delete(w.announced, path)
	if mask&unix.IN_ISDIR == 0 || !w.recursive {
		return
	}
	for announced := range w.announced {
		if strings.HasPrefix(announced, path+"/") {
			delete(w.announced, announced)
		}
	}
	if mask&unix.IN_MOVED_FROM == 0 {
		return // the kernel ends the watch of what is removed
	}
	for wd, dir := range w.dirs {
		if dir == path || strings.HasPrefix(dir, path+"/") {
			delete(w.dirs, wd)
			// Closed meanwhile, its descriptor may be another watch's.
			_ = w.conn.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
		}
	}
}

// ignoreUnreachable forgives that a directory went away before it could be
// watched, or lies too deep or too well protected for that.
func ignoreUnreachable(err error) error {
	for _, kind := range []error{fs.ErrNotExist, fs.ErrPermission, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG} {
		if errors.Is(err, kind) {
			return nil
		}
	}
	return err
}
