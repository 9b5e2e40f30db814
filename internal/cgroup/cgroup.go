// Package cgroup works with control groups of both versions: each instance has a
// group of the same name in every tree of the host. It imports nothing of ours but
// process.
package cgroup

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/process"
)

// hierarchy is one mounted cgroup tree of the host: one of several of version 1,
// each with some controllers, or the one of version 2 with all.
type hierarchy struct {
	path        string
	controllers []string // of version 1
	v2          bool
}

// Trees are all cgroup trees of the host. An instance has a directory of the same
// name in each.
type Trees []hierarchy

// Find finds the trees that are mounted.
func Find() (Trees, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroup hierarchies: %w", err)
	}
	defer f.Close()
	var found Trees
	for lines := bufio.NewScanner(f); lines.Scan(); {
		// "… root mountpoint options [tags] - type source super-options"
		before, after, ok := strings.Cut(lines.Text(), " - ")
		mount, fstype := strings.Fields(before), strings.Fields(after)
		if !ok || len(mount) < 5 || len(fstype) < 3 || mount[3] != "/" && mount[3] != "" {
			continue
		}
		switch fstype[0] {
		case "cgroup":
			found = append(found, hierarchy{path: mount[4], controllers: strings.Split(fstype[2], ",")})
		case "cgroup2":
			found = append(found, hierarchy{path: mount[4], v2: true})
		}
	}
	if len(found) == 0 {
		return nil, errors.New("find cgroup hierarchies: none is mounted; mount cgroup2 at /sys/fs/cgroup")
	}
	return found, nil
}

// file is the path of a control file: of the version 1 controller where that is
// mounted, else of version 2. An empty name means that the version has no such file.
func (hs Trees) file(group, controller, v1, v2 string) (path string, isV2 bool) {
	for _, h := range hs {
		if slices.Contains(h.controllers, controller) {
			return filepath.Join(h.path, group, v1), false
		}
	}
	for _, h := range hs {
		if h.v2 {
			return filepath.Join(h.path, group, v2), true
		}
	}
	return "", false
}

// Exists reports whether any hierarchy has the group.
func (hs Trees) Exists(group string) bool {
	return slices.ContainsFunc(hs, func(h hierarchy) bool {
		_, err := os.Lstat(filepath.Join(h.path, group))
		return err == nil
	})
}

// processes are those in the group in any hierarchy.
func (hs Trees) processes(group string) ([]process.ID, error) {
	var found []process.ID
	for _, h := range hs {
		data, err := os.ReadFile(filepath.Join(h.path, group, "cgroup.procs"))
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list processes of cgroup %s: %w", group, err)
		}
		for _, field := range bytes.Fields(data) {
			pid, err := strconv.Atoi(string(field))
			// A thread of this process may be on its way through (Enter).
			if err != nil || pid <= 0 || pid == os.Getpid() || slices.ContainsFunc(found, func(p process.ID) bool { return p.PID == pid }) {
				continue
			}
			p, err := process.Identify(pid)
			// Its start time is recorded before it is seen to be in the group, so
			// that the pid's next owner cannot be meant.
			if err == nil && inGroup(pid, group) {
				found = append(found, p)
			}
		}
	}
	return found, nil
}

func inGroup(pid int, group string) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	return err == nil && slices.ContainsFunc(strings.Split(string(data), "\n"), func(line string) bool {
		return strings.HasSuffix(line, ":"+group)
	})
}

// Kill ends every process in the group and returns when all have.
func (hs Trees) Kill(ctx context.Context, group string) error {
	for {
		procs, err := hs.processes(group)
		if err != nil || len(procs) == 0 {
			return err
		}
		var open []*process.Handle
		for _, p := range procs {
			if h, err := p.Open(); err == nil {
				open = append(open, h)
				_ = h.Kill() // it may have ended, which is waited for below
			}
		}
		for _, h := range open {
			if err := waitFor(ctx, h); err != nil {
				return fmt.Errorf("wait for process %d of cgroup %s to end: %w", h.PID, group, err)
			}
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// waitFor waits for the process to end, reaps it if it is a child of ours, and
// closes the handle.
func waitFor(ctx context.Context, h *process.Handle) error {
	defer h.Close()
	if err := h.Wait(ctx); err != nil {
		return err
	}
	h.Reap()
	return nil
}

// Remove takes the group out of every hierarchy. No process may be in it; one
// that has ended but was not reaped yet can hold it for a moment longer, and no
// event tells of that on version 1, hence the retries.
func (hs Trees) Remove(ctx context.Context, group string) error {
	for _, h := range hs {
		path := filepath.Join(h.path, group)
		for {
			err := unix.Rmdir(path)
			if err == nil || errors.Is(err, unix.ENOENT) {
				break
			}
			if !errors.Is(err, unix.EBUSY) {
				return fmt.Errorf("remove cgroup %s: %w", path, err)
			}
			select {
			case <-ctx.Done():
				return fmt.Errorf("remove cgroup %s: %w", path, err)
			case <-time.After(2 * time.Millisecond):
			}
		}
	}
	return nil
}

// Children are the groups directly below the group, in any hierarchy.
func (hs Trees) Children(group string) []string {
	var names []string
	for _, h := range hs {
		entries, _ := os.ReadDir(filepath.Join(h.path, group))
		for _, e := range entries {
			if e.IsDir() && !slices.Contains(names, e.Name()) {
				names = append(names, e.Name())
			}
		}
	}
	return names
}

// LimitMemory sets the most memory that the group may use, without swap. On
// version 2 the kernel then also ends all processes of the group together.
func (hs Trees) LimitMemory(group string, bytes int64) error {
	path, isV2 := hs.file(group, "memory", "memory.limit_in_bytes", "memory.max")
	dir := filepath.Dir(path)
	// Version 1 limits memory and swap together; the sum is never below memory.
	together := filepath.Join(dir, "memory.memsw.limit_in_bytes")
	if !isV2 {
		if err := writeNumber(together, -1); err != nil && !errors.Is(err, fs.ErrNotExist) { // a host without swap accounting has no such file
			return fmt.Errorf("limit swap: %w", err)
		}
	}
	if err := writeNumber(path, bytes); err != nil {
		return fmt.Errorf("limit memory: %w", err)
	}
	swap, swapLimit := together, bytes
	if isV2 {
		swap, swapLimit = filepath.Join(dir, "memory.swap.max"), 0
		if err := writeNumber(filepath.Join(dir, "memory.oom.group"), 1); err != nil {
			return fmt.Errorf("limit memory: %w", err)
		}
	}
	if err := writeNumber(swap, swapLimit); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("limit swap: %w", err)
	}
	return nil
}

// OOMEvents returns a file that becomes readable whenever the group is out of
// memory. It is nil on version 2, where the kernel ends the whole group by itself
// (memory.oom.group). Interface: kernel docs, cgroup-v1/memory.rst, section 10.
func (hs Trees) OOMEvents(group string) (_ *os.File, err error) {
	path, isV2 := hs.file(group, "memory", "memory.oom_control", "")
	if isV2 || path == "" {
		return nil, nil
	}
	defer func() {
		if err != nil {
			err = fmt.Errorf("watch memory of cgroup %s: %w", group, err)
		}
	}()
	control, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, err
	}
	events := os.NewFile(uintptr(fd), "oom events")
	register := fmt.Sprintf("%d %d", fd, control.Fd())
	if err := os.WriteFile(filepath.Join(filepath.Dir(path), "cgroup.event_control"), []byte(register), 0); err != nil {
		events.Close()
		return nil, err
	}
	return events, nil
}

// OutOfMemory reports whether the kernel ended a process of the group because
// the group used all its memory.
func (hs Trees) OutOfMemory(group string) bool {
	path, _ := hs.file(group, "memory", "memory.oom_control", "memory.events")
	n, err := readField(path, "oom_kill")
	return err == nil && n > 0
}

// OutOfPIDs reports whether the group was refused a task because it had as many
// as it may.
func (hs Trees) OutOfPIDs(group string) bool {
	path, _ := hs.file(group, "pids", "pids.events", "pids.events")
	n, err := readField(path, "max")
	return err == nil && n > 0
}

// CPUTime is what the group has used since it was made.
func (hs Trees) CPUTime(group string) (time.Duration, error) {
	path, isV2 := hs.file(group, "cpuacct", "cpuacct.usage", "cpu.stat")
	if isV2 {
		usec, err := readField(path, "usage_usec")
		return time.Duration(usec) * time.Microsecond, err
	}
	ns, err := readNumber(path)
	return time.Duration(ns), err
}

// Memory is what the group uses, page cache that the kernel can drop left out.
func (hs Trees) Memory(group string) (int64, error) {
	path, isV2 := hs.file(group, "memory", "memory.usage_in_bytes", "memory.current")
	used, err := readNumber(path)
	if err != nil {
		return 0, err
	}
	prefix := "total_"
	if isV2 {
		prefix = ""
	}
	stat := filepath.Join(filepath.Dir(path), "memory.stat")
	for _, field := range []string{"inactive_file", "active_file"} {
		n, err := readField(stat, prefix+field)
		if err != nil {
			return 0, err
		}
		used -= n
	}
	return max(used, 0), nil
}

// PIDs is how many tasks the group has.
func (hs Trees) PIDs(group string) (int64, error) {
	path, _ := hs.file(group, "pids", "pids.current", "pids.current")
	return readNumber(path)
}

func writeNumber(path string, n int64) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.FormatInt(n, 10))
	return errors.Join(err, f.Close())
}

func readNumber(path string) (int64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64)
}

// readField reads one number of a file of "name number" lines.
func readField(path, name string) (int64, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			return strconv.ParseInt(strings.TrimSpace(value), 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no field %s", path, name)
}

// Limits are what the processes of a group may use together. Zero is any amount.
type Limits struct {
	MemoryBytes int64   // without swap
	CPUs        float64 // processors' worth of time
	PIDs        int64   // tasks
}

// cpuPeriod is the time over which use of the processors is evened out, in
// microseconds: the kernel's default.
const cpuPeriod = 100_000

// Create makes a group with its limits, below a parent that is made if need be.
// What of the limits the host's kernel cannot hold is an error. A group that is
// there already is one too.
func (hs Trees) Create(group string, limits Limits) error {
	made := false
	for _, h := range hs {
		if !h.v2 && !slices.ContainsFunc(h.controllers, func(c string) bool { return slices.Contains(controllers, c) }) {
			continue
		}
		parent := filepath.Join(h.path, filepath.Dir(group))
		if err := os.MkdirAll(parent, 0o755); err != nil {
			return fmt.Errorf("create cgroup: %w", err)
		}
		if h.v2 {
			delegate(filepath.Dir(parent))
			delegate(parent)
		}
		if err := os.Mkdir(filepath.Join(h.path, group), 0o755); err != nil {
			return fmt.Errorf("create cgroup: %w", err)
		}
		made = true
	}
	if !made {
		return errors.New("create cgroup: no tree has a controller for memory, cpu or pids")
	}
	return hs.limit(group, limits)
}

// controllers are those that limits or figures are wanted of.
var controllers = []string{"cpu", "cpuacct", "memory", "pids"}

// delegate lets groups below a group of version 2 have controllers. Each is asked
// for alone, since one that is missing would spoil the others.
func delegate(dir string) {
	for _, c := range controllers {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0) // what is missing shows where it is used
	}
}

func (hs Trees) limit(group string, limits Limits) error {
	if limits.MemoryBytes > 0 {
		if err := hs.LimitMemory(group, limits.MemoryBytes); err != nil {
			return err
		}
	}
	if limits.CPUs > 0 {
		quota := int64(limits.CPUs * cpuPeriod)
		path, isV2 := hs.file(group, "cpu", "cpu.cfs_quota_us", "cpu.max")
		text := strconv.FormatInt(quota, 10)
		if isV2 {
			text += " " + strconv.Itoa(cpuPeriod)
		}
		if err := os.WriteFile(path, []byte(text), 0); err != nil {
			return fmt.Errorf("limit processors: %w", err)
		}
	}
	if limits.PIDs > 0 {
		path, _ := hs.file(group, "pids", "pids.max", "pids.max")
		if err := writeNumber(path, limits.PIDs); err != nil {
			return fmt.Errorf("limit tasks: %w", err)
		}
	}
	return nil
}

// Enter moves the calling thread, which must be locked to its goroutine, into the
// group: what it forks is there from its first instruction on. leave takes the
// thread back, wherever its root directory is then, and must be called. In the tree
// of version 2 a thread cannot be alone: there the child is started in the Directory.
func (hs Trees) Enter(group string) (leave func() error, err error) {
	home, err := os.ReadFile("/proc/thread-self/cgroup")
	if err != nil {
		return nil, fmt.Errorf("enter cgroup %s: %w", group, err)
	}
	var back []*os.File
	leave = func() error {
		var errs []error
		for _, f := range back {
			_, err := f.WriteString(strconv.Itoa(unix.Gettid()))
			errs = append(errs, err, f.Close())
		}
		return errors.Join(errs...)
	}
	for _, h := range hs {
		tasks := filepath.Join(h.path, group, "tasks")
		if _, err := os.Lstat(tasks); h.v2 || err != nil {
			continue
		}
		f, err := os.OpenFile(filepath.Join(h.path, h.groupIn(string(home)), "tasks"), os.O_WRONLY, 0)
		if err == nil {
			back = append(back, f)
			err = os.WriteFile(tasks, []byte(strconv.Itoa(unix.Gettid())), 0)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("enter cgroup %s: %w", group, err), leave())
		}
	}
	return leave, nil
}

// groupIn is the group in this tree by what /proc/PID/cgroup says: lines of
// "number:controllers:group".
func (h hierarchy) groupIn(said string) string {
	for line := range strings.Lines(said) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) == 3 && slices.Contains(h.controllers, strings.Split(parts[1], ",")[0]) {
			return parts[2]
		}
	}
	return "/"
}

// Directory opens the group's directory in the tree of version 2, for a process to
// be started in it (clone3's CLONE_INTO_CGROUP). It is nil where there is none.
func (hs Trees) Directory(group string) (*os.File, error) {
	for _, h := range hs {
		if h.v2 {
			return os.Open(filepath.Join(h.path, group))
		}
	}
	return nil, nil
}
