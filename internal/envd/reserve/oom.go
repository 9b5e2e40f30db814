package reserve

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// LimitTasks lowers the number of processes and threads that may be in the cgroup
// to most. A lower limit stays.
func LimitTasks(group string, most int) error {
	path := filepath.Join(group, "pids.max")
	now, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("limit processes: %w", err)
	}
	if n, err := strconv.Atoi(string(bytes.TrimSpace(now))); err == nil && n <= most {
		return nil
	}
	if err := os.WriteFile(path, []byte(strconv.Itoa(most)), 0); err != nil {
		return fmt.Errorf("limit processes: %w", err)
	}
	return nil
}

// OOMKiller does what a kernel does whose memory runs out, for one that does not:
// there the end of the memory is the end of the sandbox. It kills the cgroup with
// the most memory of those below one.
type OOMKiller struct {
	groups string // directory of a cgroup of version 2, whose children are what is killed
	log    *slog.Logger
	wake   chan struct{}
	look   func() memory // a test has another one
}

// NewOOMKiller returns a killer for Run. It has the kernel count the memory of
// each group, which is why no process may be in groups itself.
func NewOOMKiller(groups string, log *slog.Logger) (*OOMKiller, error) {
	if err := os.WriteFile(filepath.Join(groups, "cgroup.subtree_control"), []byte("+memory"), 0); err != nil {
		return nil, fmt.Errorf("count memory by cgroup: %w", err)
	}
	return &OOMKiller{groups: groups, log: log, wake: make(chan struct{}, 1), look: systemMemory}, nil
}

// Wake tells that a process is being started. While none runs nothing is watched.
func (k *OOMKiller) Wake() {
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

const (
	// lowMemory is the part of the memory that is to be left. For each task some
	// is to be left besides, in bytes: what a sandbox kernel takes for it is on
	// nobody's account. And more for each process where there are many: when each
	// of them forks once more, memory shrinks faster than can be looked.
	lowMemory, taskMemory, processMemory = 32, 256 << 10, 1 << 20
	// manyTasks is when to count processes, which takes longer than the rest.
	manyTasks = 64
	// fillRate is how fast programs fill memory at the most, in bytes a second:
	// so long the next look can wait.
	fillRate = 4 << 30
	// soon and late bound the time between two looks.
	soon, late = 2 * time.Millisecond, 250 * time.Millisecond
	// startTime is how long after Wake a process may take to show in its group.
	startTime = 2 * time.Second
	// exitTime is how long a group that was killed gets to give its memory back
	// before the next one is.
	exitTime = 500 * time.Millisecond
)

// Run watches the memory until ctx ends. There is no event to wait for.
func (k *OOMKiller) Run(ctx context.Context) {
	var started, killed time.Time
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-k.wake:
			started = time.Now()
		case <-timer.C:
		}
		m := k.look()
		if m.tasks > manyTasks {
			m.processes = k.processes()
		}
		if m.spare() < 0 && time.Since(killed) > exitTime && k.kill(m) {
			killed = time.Now()
		}
		pause := min(max(time.Duration(float64(m.spare())/fillRate*float64(time.Second)), soon), late)
		if time.Since(started) < startTime || k.populated() {
			timer.Reset(pause)
		}
	}
}

// memory is what the system says of its memory, in bytes, and its tasks.
type memory struct{ total, free, tasks, processes uint64 }

func systemMemory() memory {
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) != nil {
		return memory{free: math.MaxInt64}
	}
	unit := uint64(info.Unit)
	return memory{total: uint64(info.Totalram) * unit, free: uint64(info.Freeram) * unit, tasks: uint64(info.Procs)}
}

// spare is what programs may still take, in bytes; below zero when it is too much
// already.
func (m memory) spare() int64 {
	return int64(m.free) - int64(m.total/lowMemory) - int64(m.tasks*taskMemory) - int64(m.processes*processMemory)
}

func (k *OOMKiller) populated() bool {
	events, err := os.ReadFile(filepath.Join(k.groups, "cgroup.events"))
	return err == nil && bytes.Contains(events, []byte("populated 1"))
}

// list returns the processes of each group that has some, one a line.
func (k *OOMKiller) list() map[string][]byte {
	pids := make(map[string][]byte)
	entries, _ := os.ReadDir(k.groups)
	for _, entry := range entries {
		list, err := os.ReadFile(filepath.Join(k.groups, entry.Name(), "cgroup.procs"))
		if err == nil && len(list) > 0 {
			pids[entry.Name()] = list
		}
	}
	return pids
}

func (k *OOMKiller) processes() (n uint64) {
	for _, list := range k.list() {
		n += uint64(bytes.Count(list, []byte("\n")))
	}
	return n
}

// kill kills the largest group; false when there is none.
func (k *OOMKiller) kill(m memory) bool {
	pids := k.list()
	victim := k.largest(slices.Sorted(maps.Keys(pids)))
	if victim == "" {
		return false
	}
	if err := os.WriteFile(filepath.Join(k.groups, victim, "cgroup.kill"), []byte("1"), 0); err != nil {
		return false
	}
	first, _, _ := bytes.Cut(pids[victim], []byte("\n"))
	k.log.Warn("out of memory: killed the processes that used most", "pid", string(first),
		"processes", bytes.Count(pids[victim], []byte("\n")), "free_mib", m.free>>20, "tasks", m.tasks)
	return true
}

// largest returns the group with the most memory. It measures only where there is
// a choice: that takes the sandbox kernel a tenth of a second when it is busy.
func (k *OOMKiller) largest(groups []string) string {
	if len(groups) == 1 {
		return groups[0]
	}
	var largest string
	var most uint64
	for _, group := range groups {
		data, err := os.ReadFile(filepath.Join(k.groups, group, "memory.current"))
		if err != nil {
			continue
		}
		n, err := strconv.ParseUint(string(bytes.TrimSpace(data)), 10, 64)
		if err == nil && (largest == "" || n > most) {
			largest, most = group, n
		}
	}
	return largest
}
