// Package cgroup gives each process of the sandbox a cgroup of its own, so that
// all it has started can be killed at once wherever it has gone, and keeps those
// of the user from taking what the agent needs. It speaks version 2 only.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// ErrNone says that there is no hierarchy that groups can be made in.
var ErrNone = errors.New("no writable cgroup hierarchy of version 2")

// Tree is the part of a hierarchy that a sandbox's processes live in.
type Tree struct {
	users string // directory of the groups
	watch *watch

	mu      sync.Mutex
	last    uint64            // number of the youngest group
	leaving map[string]*Group // ended but not empty, by path
	spare   []*Group          // empty, for the next processes
}

// maxSpare bounds how many empty groups are kept.
const maxSpare = 8

// Find returns where cgroup version 2 is mounted. The error is ErrNone when it is
// not.
func Find() (string, error) {
	data, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", fmt.Errorf("find cgroups: %w", err)
	}
	return mountOf(string(data))
}

// New prepares the hierarchy at root, which belongs to the agent: agent/ for the
// agent itself, user/ for what it starts. Run must run for groups that processes
// stay behind in to be removed.
func New(root string) (*Tree, error) {
	t := &Tree{users: filepath.Join(root, "user"), leaving: make(map[string]*Group)}
	for _, dir := range []string{t.users, filepath.Join(root, "agent")} {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, fmt.Errorf("%w: %w", ErrNone, err)
		}
	}
	// What an agent before this one left.
	entries, err := os.ReadDir(t.users)
	if err != nil {
		return nil, fmt.Errorf("list cgroups: %w", err)
	}
	for _, entry := range entries {
		if entry.IsDir() {
			_ = unix.Rmdir(filepath.Join(t.users, entry.Name()))
		}
	}
	if err := limit(root); err != nil {
		return nil, err
	}
	if t.watch, err = newWatch(); err != nil {
		return nil, err
	}
	return t, nil
}

// Run removes the groups of ended processes when the last process leaves them,
// until ctx ends.
func (t *Tree) Run(ctx context.Context) { t.watch.run(ctx, t.settle) }

// settle removes the group at path if its process has ended and nobody is left.
func (t *Tree) settle(path string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if g := t.leaving[path]; g != nil && g.remove() {
		delete(t.leaving, path)
		t.watch.forget(path)
	}
}

// Group is the cgroup of one process and of what that starts. A nil Group is
// that of a process without one.
type Group struct {
	tree *Tree
	path string
	dir  *os.File
	// killed groups are not used again: Linux 6.18 takes a process started in one
	// for a fork that escapes the kill, and kills it too.
	killed atomic.Bool
}

// Take returns an empty group. Its Release must be called.
func (t *Tree) Take() (*Group, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if n := len(t.spare); n > 0 {
		g := t.spare[n-1]
		t.spare = t.spare[:n-1]
		return g, nil
	}
	for {
		t.last++
		path := filepath.Join(t.users, strconv.FormatUint(t.last, 10))
		err := os.Mkdir(path, 0o755)
		if errors.Is(err, fs.ErrExist) {
			continue // from an agent before this one
		}
		if err != nil {
			return nil, fmt.Errorf("make cgroup: %w", err)
		}
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			_ = unix.Rmdir(path)
			return nil, fmt.Errorf("open cgroup: %w", err)
		}
		return &Group{tree: t, path: path, dir: os.NewFile(uintptr(fd), path)}, nil
	}
}

// FD returns a descriptor to start a process in the group with.
func (g *Group) FD() int { return int(g.dir.Fd()) }

// Kill kills every process in the group.
func (g *Group) Kill() error {
	g.killed.Store(true)
	err := g.write("cgroup.kill", "1")
	if errors.Is(err, fs.ErrNotExist) {
		err = g.killEach()
	}
	if err != nil {
		return fmt.Errorf("kill cgroup: %w", err)
	}
	return nil
}

// killEach kills the processes where the kernel does not do it at once. Frozen
// they can neither fork nor end, so no number is another's meanwhile.
func (g *Group) killEach() error {
	if err := g.write("cgroup.freeze", "1"); err != nil {
		return err
	}
	defer func() { _ = g.write("cgroup.freeze", "0") }()
	data, err := os.ReadFile(filepath.Join(g.path, "cgroup.procs"))
	if err != nil {
		return err
	}
	for _, pid := range numbers(data) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
	return nil
}

func (g *Group) write(name, value string) error {
	return os.WriteFile(filepath.Join(g.path, name), []byte(value), 0)
}

// Release gives the group up: its process has ended. It goes when the last
// process that is still in it ends.
func (g *Group) Release() {
	if g == nil {
		return
	}
	t := g.tree
	if !g.killed.Load() && g.empty() {
		t.mu.Lock()
		keep := len(t.spare) < maxSpare
		if keep {
			t.spare = append(t.spare, g)
		}
		t.mu.Unlock()
		if keep {
			return
		}
	}
	if g.remove() {
		return
	}
	// The directory's descriptor is not needed any more: those who stay may be
	// many, and for long.
	g.dir.Close()
	t.mu.Lock()
	t.leaving[g.path] = g
	t.mu.Unlock()
	t.watch.add(g.path)
	// The last may have left before the watch was there.
	t.settle(g.path)
}

// Discard is Release for a group that turned out to be unusable.
func (g *Group) Discard() {
	if !g.remove() {
		g.dir.Close()
	}
}

func (g *Group) remove() bool {
	err := unix.Rmdir(g.path)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return false
	}
	g.dir.Close()
	return true
}

// empty reports whether nothing runs in the group or below it.
func (g *Group) empty() bool {
	fd, err := unix.Openat(int(g.dir.Fd()), "cgroup.events", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var buf [256]byte
	n, err := unix.Read(fd, buf[:])
	return err == nil && unpopulated(buf[:n])
}
