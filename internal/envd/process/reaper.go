package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/envd/cgroup"
)

// errGone says that a process has ended (and may have been reaped).
var errGone = errors.New("process has ended")

// Reaper starts children and waits for them. All waiting is done by it alone:
// as pid 1 it also inherits orphans, which it must wait for without taking the
// exit status of a child that somebody else waits for.
type Reaper struct {
	orphans bool
	signals chan os.Signal
	forker  forker
	groups  *cgroup.Tree // nil without cgroups

	// forks is read-locked from a fork until the child is known, so that who
	// finds an ended process that nobody knows can wait until it is either known
	// or certainly an orphan.
	forks sync.RWMutex

	// mu is held over each wait and each kill, so that a signal never hits a
	// number that has been given to another process meanwhile.
	mu       sync.Mutex
	children map[int]*child
}

// child is a process that has been started and not reaped.
type child struct {
	pid    int
	group  *cgroup.Group // nil where there are none
	exited chan syscall.WaitStatus
}

// NewReaper returns a reaper; Run makes it work. With orphans it reaps every
// child of this process, whoever started it: for pid 1.
func NewReaper(orphans bool) *Reaper {
	return &Reaper{orphans: orphans, signals: make(chan os.Signal, 1), children: make(map[int]*child)}
}

// Run reaps orphans until ctx ends. Children are waited for one by one.
func (r *Reaper) Run(ctx context.Context) {
	if !r.orphans {
		<-ctx.Done()
		return
	}
	signal.Notify(r.signals, syscall.SIGCHLD)
	defer signal.Stop(r.signals)
	for {
		r.sweep()
		select {
		case <-r.signals:
		case <-ctx.Done():
			return
		}
	}
}

// Group gives each process that is started from now on a cgroup in t. It is called
// before any start.
func (r *Reaper) Group(t *cgroup.Tree) { r.groups = t }

// start runs a program. Its wait status comes over the child's channel.
func (r *Reaper) start(path string, argv []string, attr *syscall.ProcAttr) (*child, error) {
	pidfd := -1
	attr.Sys.PidFD = &pidfd
	// Programs that have the rights can spoil the cgroups. That must not keep
	// anything from being started.
	group := r.group()
	r.forks.RLock()
	pid, err := r.fork(path, argv, attr, group)
	if group != nil && (errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EOPNOTSUPP)) {
		group.Discard()
		group = nil
		pid, err = r.fork(path, argv, attr, nil)
	}
	if err != nil {
		r.forks.RUnlock()
		group.Release()
		return nil, err
	}
	c := &child{pid: pid, group: group, exited: make(chan syscall.WaitStatus, 1)}
	r.mu.Lock()
	r.children[pid] = c
	r.mu.Unlock()
	r.forks.RUnlock()
	go r.watch(c, pidfd)
	return c, nil
}

func (r *Reaper) group() *cgroup.Group {
	if r.groups == nil {
		return nil
	}
	group, err := r.groups.Take()
	if err != nil {
		return nil
	}
	return group
}

func (r *Reaper) fork(path string, argv []string, attr *syscall.ProcAttr, group *cgroup.Group) (int, error) {
	attr.Sys.UseCgroupFD = group != nil
	if group != nil {
		attr.Sys.CgroupFD = group.FD()
	}
	return r.forker.fork(path, argv, attr)
}

// watch waits until the child has ended, and reaps it. A descriptor of each child
// tells of its end without a look at any other, which a signal that children end
// would not.
func (r *Reaper) watch(c *child, pidfd int) {
	defer c.group.Release()
	if pidfd >= 0 {
		_ = unix.SetNonblock(pidfd, true) // so that the wait holds no thread
		f := os.NewFile(uintptr(pidfd), "pidfd")
		defer f.Close()
		conn, err := f.SyscallConn()
		if err == nil {
			err = conn.Read(func(uintptr) bool { return r.reap(c) })
		}
		if err == nil {
			return
		}
	}
	// An old kernel. A thread waits.
	for !r.reap(c) {
		_ = unix.Waitid(unix.P_PID, c.pid, nil, unix.WEXITED|unix.WNOWAIT, nil)
	}
}

// reap collects the child's status if it has ended; true when that is done.
func (r *Reaper) reap(c *child) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.collect(c)
}

// collect is reap for who holds mu.
func (r *Reaper) collect(c *child) bool {
	if r.children[c.pid] != c {
		return true
	}
	status, ended := wait(c.pid)
	if ended {
		delete(r.children, c.pid)
		c.exited <- status
	}
	return ended
}

// wait reaps a process if it has ended.
func wait(pid int) (status syscall.WaitStatus, ended bool) {
	for {
		got, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		return status, err == nil && got == pid
	}
}

// sweep reaps whatever has ended.
func (r *Reaper) sweep() {
	for {
		pid := endedChild()
		if pid == 0 {
			return
		}
		r.mu.Lock()
		c := r.children[pid]
		if c != nil {
			r.collect(c)
		}
		r.mu.Unlock()
		if c != nil {
			continue
		}
		// An orphan, or a child so short-lived that it is not known yet. After a
		// start that failed there may be nothing left to wait for.
		r.forks.Lock()
		r.mu.Lock()
		if c := r.children[pid]; c != nil {
			r.collect(c)
		} else {
			wait(pid)
		}
		r.mu.Unlock()
		r.forks.Unlock()
	}
}

// endedChild returns a process that is there to be reaped, 0 when there is none.
func endedChild() int {
	var info childInfo
	for {
		err := unix.Waitid(unix.P_ALL, 0, info.siginfo(), unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil {
			return 0
		}
		return info.pid()
	}
}

// signal sends sig to the process group of a child. SIGKILL goes to all that the
// child has started, wherever it has gone.
func (r *Reaper) signal(c *child, sig syscall.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.children[c.pid] != c {
		return errGone
	}
	if sig == syscall.SIGKILL {
		// A program that has the right to can remove its group.
		if c.group == nil || c.group.Kill() != nil {
			return r.killTree(c.pid)
		}
	}
	if err := signalGroup(c.pid, sig); err != nil {
		return fmt.Errorf("signal process group %d: %w", c.pid, err)
	}
	return nil
}

// signalGroup signals a child and its process group. The child is not reaped, so
// the group is its own; it may have left that for another.
func signalGroup(pid int, sig syscall.Signal) error {
	err := syscall.Kill(-pid, sig)
	if group, failure := syscall.Getpgid(pid); failure == nil && group != pid {
		err = syscall.Kill(pid, sig)
	}
	return err
}
