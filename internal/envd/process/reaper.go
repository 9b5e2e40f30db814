package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// errGone says that a process has ended (and may have been reaped).
var errGone = errors.New("process has ended")

// Reaper starts children and waits for them. All waiting is done by it alone:
// as pid 1 it also inherits orphans, which it must wait for without taking the
// exit status of a child that somebody else waits for.
type Reaper struct {
	orphans bool
	signals chan os.Signal

	// mu is held over fork and exec, so that a child is known before its end can
	// be seen, and over kill, so that a signal never hits a number that has been
	// given to another process meanwhile.
	mu       sync.Mutex
	children map[int]chan syscall.WaitStatus
}

// NewReaper returns a reaper; Run makes it work. With orphans it reaps every
// child of this process, whoever started it: for pid 1.
func NewReaper(orphans bool) *Reaper {
	r := &Reaper{
		orphans:  orphans,
		signals:  make(chan os.Signal, 1),
		children: make(map[int]chan syscall.WaitStatus),
	}
	signal.Notify(r.signals, syscall.SIGCHLD)
	return r
}

// Run reaps children until ctx ends.
func (r *Reaper) Run(ctx context.Context) {
	defer signal.Stop(r.signals)
	for {
		r.reap()
		select {
		case <-r.signals:
		case <-ctx.Done():
			return
		}
	}
}

// start runs a program. Its wait status comes over the channel.
func (r *Reaper) start(path string, argv []string, attr *syscall.ProcAttr) (int, <-chan syscall.WaitStatus, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	pid, err := syscall.ForkExec(path, argv, attr)
	if err != nil {
		return 0, nil, err
	}
	exited := make(chan syscall.WaitStatus, 1)
	r.children[pid] = exited
	return pid, exited, nil
}

// signal sends sig to the process group of a child.
func (r *Reaper) signal(pid int, sig syscall.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, ok := r.children[pid]; !ok {
		return errGone
	}
	if err := syscall.Kill(-pid, sig); err != nil {
		return fmt.Errorf("signal process group %d: %w", pid, err)
	}
	return nil
}

func (r *Reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.orphans {
		for r.wait(-1) {
		}
		return
	}
	for pid := range r.children {
		r.wait(pid)
	}
}

// wait reaps one ended child, if there is one.
func (r *Reaper) wait(pid int) bool {
	for {
		var status syscall.WaitStatus
		got, err := syscall.Wait4(pid, &status, syscall.WNOHANG, nil)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || got <= 0 {
			return false
		}
		if exited, ok := r.children[got]; ok {
			exited <- status
			delete(r.children, got)
		}
		return true
	}
}
