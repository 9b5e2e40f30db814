package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// waiter waits for the events of a userfaultfd in a thread of its own: that of the
// goroutine that makes it. The runtime's poller would wake a second one for each event,
// to look for more to do.
type waiter struct {
	fds    [2]unix.PollFd // the userfaultfd, and what is written to when the context ends
	thread int
	stop   func() bool   // of the watch for the end of the context
	closed chan struct{} // nobody waits any more
	let    chan struct{} // closed when the watch, once begun, is over
}

func newWaiter(ctx context.Context, fd int) (*waiter, error) {
	end, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("wait for page faults: %w", err)
	}
	runtime.LockOSThread()
	w := &waiter{
		fds:    [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(end), Events: unix.POLLIN}},
		thread: unix.Gettid(), closed: make(chan struct{}), let: make(chan struct{}),
	}
	w.stop = context.AfterFunc(ctx, w.release)
	return w, nil
}

const releaseAgain = 10 * time.Millisecond

// release has the thread return from what it is in, and comes back when it has.
func (w *waiter) release() {
	defer close(w.let)
	_, _ = unix.Write(int(w.fds[1].Fd), []byte{1, 0, 0, 0, 0, 0, 0, 0}) // there is room for it
	again := time.NewTicker(releaseAgain)
	defer again.Stop()
	for {
		select {
		case <-w.closed:
			return
		case <-again.C:
		}
		// The monitor shares the userfaultfd, and can make it one that holds up who reads
		// it, at any time. A signal has the thread look again; the runtime takes this one
		// for nothing.
		_ = unix.SetNonblock(int(w.fds[0].Fd), true)
		_ = unix.Tgkill(os.Getpid(), w.thread, unix.SIGURG)
	}
}

// wait returns when there is something to read, or the context has ended.
func (w *waiter) wait() error {
	if _, err := unix.Poll(w.fds[:], -1); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("wait for page faults: %w", err)
	}
	if w.fds[1].Revents != 0 {
		return context.Canceled
	}
	if w.fds[0].Revents&^unix.POLLIN != 0 { // as of one that would hold up who reads it
		return errors.New("the monitor's userfaultfd has become another")
	}
	return nil
}

func (w *waiter) close() {
	close(w.closed)
	if !w.stop() {
		<-w.let
	}
	unix.Close(int(w.fds[1].Fd))
	runtime.UnlockOSThread()
}
