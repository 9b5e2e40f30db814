package cgroup

import (
	"context"
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// watch tells when the last process has left a group.
type watch struct {
	file *os.File // inotify

	mu      sync.Mutex
	paths   map[int]string // of the groups watched, by watch number
	numbers map[string]int
}

func newWatch() (*watch, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch cgroups: %w", err)
	}
	file := os.NewFile(uintptr(fd), "inotify")
	return &watch{file: file, paths: make(map[int]string), numbers: make(map[string]int)}, nil
}

// add watches the group at path. Where that fails the group stays until the
// machine ends, which costs a little of its memory.
func (w *watch) add(path string) {
	conn, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	_ = conn.Control(func(fd uintptr) {
		n, err := unix.InotifyAddWatch(int(fd), filepath.Join(path, "cgroup.events"), unix.IN_MODIFY)
		if err == nil {
			w.paths[n], w.numbers[path] = path, n
		}
	})
}

// forget ends the watch on the group at path. The kernel would keep the group
// that is watched, also when it has been removed.
func (w *watch) forget(path string) {
	conn, err := w.file.SyscallConn()
	if err != nil {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	n, ok := w.numbers[path]
	if !ok {
		return
	}
	delete(w.numbers, path)
	delete(w.paths, n)
	_ = conn.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(n)) })
}

// run calls changed for each group watched that changes, until ctx ends.
func (w *watch) run(ctx context.Context, changed func(path string)) {
	stop := context.AfterFunc(ctx, func() { w.file.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	buf := make([]byte, 64*unix.SizeofInotifyEvent)
	for {
		n, err := w.file.Read(buf)
		if err != nil {
			w.file.Close()
			return
		}
		for rest := buf[:n]; len(rest) >= unix.SizeofInotifyEvent; {
			number := int(int32(binary.NativeEndian.Uint32(rest)))
			name := binary.NativeEndian.Uint32(rest[12:])
			rest = rest[min(len(rest), unix.SizeofInotifyEvent+int(name)):]
			for _, path := range w.changed(number) {
				changed(path)
			}
		}
	}
}

// changed returns the groups that an event with a watch's number is about.
func (w *watch) changed(number int) []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	if number < 0 { // the kernel's queue was full: any may have changed
		return slices.Collect(maps.Values(w.paths))
	}
	if path, ok := w.paths[number]; ok {
		return []string{path}
	}
	return nil
}
