package filesystem

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	rpc "github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/envd/atomicfile"
)

// errOverflow says that changes came faster than they were read, and some are
// not known.
var errOverflow = errors.New("events were lost: the directory changes faster than its events are read")

const (
	watchMask = unix.IN_CREATE | unix.IN_MOVED_TO | unix.IN_MOVED_FROM | unix.IN_MODIFY | unix.IN_ATTRIB |
		unix.IN_DELETE | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR
	eventHeader = int(unsafe.Sizeof(unix.InotifyEvent{}))
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
	fd        int
	root      string
	recursive bool
	dirs      map[int32]string // by watch descriptor

	// announced holds what was found by looking into a new directory: the event
	// for it may still come, and is then no news.
	announced map[string]struct{}
}

func newWatch(root string, recursive bool) (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("start watching: %w", err)
	}
	w := &watch{
		file: os.NewFile(uintptr(fd), "inotify"), fd: fd, root: root, recursive: recursive,
		dirs: make(map[int32]string), announced: make(map[string]struct{}),
	}
	if err := w.add(root, 0); err != nil {
		w.Close()
		return nil, err
	}
	if recursive {
		if err := w.addBelow(root, nil); err != nil {
			w.Close()
			return nil, err
		}
	}
	return w, nil
}

// Close ends run.
func (w *watch) Close() { w.file.Close() }

// run calls emit for every change, in order, until ctx ends, emit fails or
// events were lost.
func (w *watch) run(ctx context.Context, emit func(change) error) error {
	stop := context.AfterFunc(ctx, w.Close)
	defer stop()
	buf := make([]byte, 16<<10)
	for {
		n, err := w.file.Read(buf)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("read events: %w", err)
		}
		for rest := buf[:n]; len(rest) >= eventHeader; {
			event := (*unix.InotifyEvent)(unsafe.Pointer(&rest[0]))
			end := eventHeader + int(event.Len)
			name := string(bytes.TrimRight(rest[eventHeader:end], "\x00"))
			if err := w.handle(event.Wd, event.Mask, name, emit); err != nil {
				return err
			}
			rest = rest[end:]
		}
	}
}

func (w *watch) handle(wd int32, mask uint32, name string, emit func(change) error) error {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		return errOverflow
	}
	dir, known := w.dirs[wd]
	if mask&unix.IN_IGNORED != 0 {
		delete(w.dirs, wd)
		return nil
	}
	if !known || atomicfile.IsTemp(name) {
		return nil
	}
	if name == "" && dir != w.root {
		return nil // its parent is watched too and tells the same
	}
	path := filepath.Join(dir, name)
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return w.created(path, mask&unix.IN_ISDIR != 0, emit)
	case mask&(unix.IN_MOVED_FROM|unix.IN_MOVE_SELF) != 0:
		if mask&unix.IN_ISDIR != 0 {
			w.dropBelow(path)
		}
		delete(w.announced, path)
		return emit(change{path, rpc.EventType_EVENT_TYPE_RENAME})
	case mask&unix.IN_ATTRIB != 0:
		return emit(change{path, rpc.EventType_EVENT_TYPE_CHMOD})
	case mask&unix.IN_MODIFY != 0:
		return emit(change{path, rpc.EventType_EVENT_TYPE_WRITE})
	case mask&(unix.IN_DELETE|unix.IN_DELETE_SELF) != 0:
		delete(w.announced, path)
		return emit(change{path, rpc.EventType_EVENT_TYPE_REMOVE})
	}
	return nil
}

func (w *watch) created(path string, isDir bool, emit func(change) error) error {
	if _, known := w.announced[path]; known {
		delete(w.announced, path)
		return nil
	}
	if err := emit(change{path, rpc.EventType_EVENT_TYPE_CREATE}); err != nil {
		return err
	}
	if !isDir || !w.recursive {
		return nil
	}
	if err := w.add(path, unix.IN_DONT_FOLLOW); err != nil {
		return ignoreGone(err)
	}
	// What was made in it before it was watched gave no events.
	return ignoreGone(w.addBelow(path, emit))
}

// addBelow watches the directories below dir. With emit it reports everything it
// finds as created.
func (w *watch) addBelow(dir string, emit func(change) error) error {
	children, err := os.ReadDir(dir)
	if err != nil {
		return ignoreGone(err)
	}
	for _, child := range children {
		path := filepath.Join(dir, child.Name())
		if emit != nil && !atomicfile.IsTemp(path) {
			if err := w.announce(path, child, emit); err != nil {
				return err
			}
		}
		if !child.IsDir() {
			continue
		}
		if err := w.add(path, unix.IN_DONT_FOLLOW); err != nil {
			if ignoreGone(err) == nil {
				continue
			}
			return err
		}
		if err := w.addBelow(path, emit); err != nil {
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

func (w *watch) add(dir string, flags uint32) error {
	wd, err := unix.InotifyAddWatch(w.fd, dir, watchMask|flags)
	if err != nil {
		return &fs.PathError{Op: "watch", Path: dir, Err: err}
	}
	w.dirs[int32(wd)] = dir
	return nil
}

// dropBelow forgets a directory that was moved away, and all below it: their
// paths are no longer true. Should it come back it is watched anew.
func (w *watch) dropBelow(dir string) {
	for wd, path := range w.dirs {
		if path == dir || strings.HasPrefix(path, dir+"/") {
			delete(w.dirs, wd)
			_, _ = unix.InotifyRmWatch(w.fd, uint32(wd))
		}
	}
}

// ignoreGone forgives that a directory went away before it could be watched.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	return err
}
