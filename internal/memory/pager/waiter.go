package pager

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// waiter waits for the events of a userfaultfd in a thread. The runtime's poller would
// wake a second one for each event, to look for more to do.
type waiter struct {
	fds  [2]unix.PollFd // the userfaultfd, and what is written to when the context ends
	stop func()
}

func newWaiter(ctx context.Context, fd int) (*waiter, error) {
	end, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("wait for page faults: %w", err)
	}
	told := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(told)
		_, _ = unix.Write(end, []byte{1, 0, 0, 0, 0, 0, 0, 0}) // there is room for it
	})
	w := &waiter{fds: [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(end), Events: unix.POLLIN}}}
	w.stop = func() {
		if !stop() {
			<-told
		}
		unix.Close(end)
	}
	return w, nil
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

func (w *waiter) close() { w.stop() }
