package process

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// childOOMScore makes the kernel prefer what the sandbox's user started when
	// memory runs out; agentOOMScore keeps it from the agent altogether.
	childOOMScore = 100
	agentOOMScore = -1000
	// agentNice is the agent's niceness, so that it is served among busy
	// processes; children have 0.
	agentNice = -20
	// initPIDNamespace is the inode of the namespace in which pid 1 is the
	// kernel's own first process: a constant of the kernel.
	initPIDNamespace = 0xEFFFFFFC
)

// forker starts programs that do not share in the agent's privileges before other
// processes. Its zero value has none to keep from them.
type forker struct {
	nice bool // the agent's niceness differs from the children's
	oom  bool // the agent's OOM score differs from the children's
}

// Prefer puts the agent before all other processes for the processor, and after
// them for being killed when memory runs out. Call it before any start, and only
// where the machine is the agent's. It does what the system lets it.
//
// A child gets the agent's OOM score with the fork, and could hand it on before
// anybody corrects it. The kernel never kills its own first process, so when the
// agent is that, it takes the children's score itself. Otherwise each child is
// stopped at its first instruction until its score is right.
func (r *Reaper) Prefer() error {
	err := renice(agentNice)
	r.forker.nice = err == nil
	score := agentOOMScore
	// Without the right to trace processes of other users none could be stopped
	// for the correction. gVisor is such a place, and does not use the score.
	if isFirstProcess() || !mayTrace() {
		score = childOOMScore
	}
	if failure := setOOMScore("self", score); failure != nil {
		if err == nil {
			err = failure
		}
	} else {
		r.forker.oom = score != childOOMScore
	}
	return err
}

func isFirstProcess() bool {
	var stat unix.Stat_t
	return os.Getpid() == 1 && unix.Stat("/proc/self/ns/pid", &stat) == nil && stat.Ino == initPIDNamespace
}

// mayTrace reports whether the agent may trace any process.
func mayTrace() bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	return unix.Capget(&header, &sets[0]) == nil && sets[0].Effective&(1<<unix.CAP_SYS_PTRACE) != 0
}

func setOOMScore(pid string, score int) error {
	f, err := os.OpenFile("/proc/"+pid+"/oom_score_adj", os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set OOM score: %w", err)
	}
	defer f.Close()
	if _, err := f.WriteString(strconv.Itoa(score)); err != nil {
		return fmt.Errorf("set OOM score: %w", err)
	}
	return nil
}

// renice changes the niceness of every thread of the agent: Linux has it by
// thread. Threads made later inherit it from the one that makes them.
func renice(nice int) error {
	done := make(map[int]bool)
	for again := true; again; {
		again = false
		threads, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return fmt.Errorf("list the agent's threads: %w", err)
		}
		for _, thread := range threads {
			tid, err := strconv.Atoi(thread.Name())
			if err != nil || done[tid] {
				continue
			}
			if err := unix.Setpriority(unix.PRIO_PROCESS, tid, nice); err != nil && err != unix.ESRCH {
				return fmt.Errorf("set the agent's niceness: %w", err)
			}
			// One made meanwhile by a thread not changed yet shows in the next look.
			done[tid], again = true, true
		}
	}
	return nil
}

// fork starts a program.
func (f *forker) fork(path string, argv []string, attr *syscall.ProcAttr) (int, error) {
	if !f.nice && !f.oom {
		return syscall.ForkExec(path, argv, attr)
	}
	// The child inherits from this thread, which nothing else uses meanwhile: the
	// Go runtime does not make threads from a locked one either.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if f.nice && unix.Setpriority(unix.PRIO_PROCESS, 0, 0) == nil {
		defer func() { _ = unix.Setpriority(unix.PRIO_PROCESS, 0, agentNice) }()
	}
	if !f.oom {
		return syscall.ForkExec(path, argv, attr)
	}
	attr.Sys.Ptrace = true
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, err
	}
	// Without taking the status: it may be the child's end, if somebody killed it.
	const events = unix.WSTOPPED | unix.WEXITED | unix.WNOWAIT | unix.WALL
	for errors.Is(unix.Waitid(unix.P_PID, pid, nil, events, nil), syscall.EINTR) {
		continue
	}
	_ = setOOMScore(strconv.Itoa(pid), childOOMScore)
	_ = syscall.PtraceDetach(pid)
	return pid, nil
}
