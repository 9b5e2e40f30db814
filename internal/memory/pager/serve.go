package pager

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const (
	eventsAtOnce = 64
	retryAfter   = 50 * time.Microsecond // the kernel says EAGAIN until the other thread runs
	pieceSize    = 64 << 10              // is put in at once; a fault waits no longer than for that
)

// server serves the page faults of one virtual machine.
type server struct {
	*guest
	threads int
	around  int64
	record  *recorder

	jobs  chan event
	again []event // the reader's, which have to wait
}

// run serves until ctx ends, the process does, or there is something that cannot
// be served.
func (s *server) run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	s.jobs = make(chan event, eventsAtOnce)
	for range s.threads - 1 {
		g.Go(func() error { return s.help(ctx) })
	}
	g.Go(func() error { return s.read(ctx) })
	return g.Wait()
}

// buffer has room for pieces of so many bytes, and for a page.
func (s *server) buffer(piece int64) []byte { return make([]byte, bufferSize(s.page, piece)) }

func bufferSize(page, piece int64) int64 { return max(page, piece) }

// help serves what the reader hands on.
func (s *server) help(ctx context.Context) error {
	buf := s.buffer(sequential)
	for {
		select {
		case e := <-s.jobs:
			if err := retry(ctx, func() error { return s.serve(e, buf) }); err != nil {
				return err
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// retry does f until no change of the memory is in its way.
func retry(ctx context.Context, f func() error) error {
	for {
		err := f()
		if !errors.Is(err, errAgain) {
			return err
		}
		if err := pause(ctx, retryAfter); err != nil {
			return err
		}
	}
}

// pause waits for what gives no event.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *server) read(ctx context.Context) error {
	w, err := newWaiter(ctx, s.uffd.fd)
	if err != nil {
		return err
	}
	defer w.close()
	buf := s.buffer(sequential)
	events := make([]event, 0, eventsAtOnce)
	bytes := make([]byte, eventsAtOnce*eventSize)
	for {
		// Events that have to wait are tried again, and the next are read, without
		// waiting for any.
		if len(s.again) > 0 {
			if err := pause(ctx, retryAfter); err != nil {
				return err
			}
		}
		events, err = s.readEvents(bytes, events[:0])
		if err == nil && len(events) == 0 && len(s.again) == 0 {
			if err = w.wait(); err == nil {
				continue
			}
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		events = append(events, s.again...)
		s.again = s.again[:0]
		if err := s.serveAll(ctx, events, buf); err != nil {
			return err
		}
	}
}

// readEvents reads without waiting, and notes what is no fault.
func (s *server) readEvents(bytes []byte, events []event) ([]event, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, err := unix.Read(s.uffd.fd, bytes)
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR) {
		return events, nil
	}
	if err != nil {
		return events, os.NewSyscallError("read userfaultfd", err)
	}
	if n == 0 {
		return events, io.EOF
	}
	for b := bytes[:n]; len(b) >= eventSize; b = b[eventSize:] {
		e := decodeEvent(b)
		if e.kind == eventPageFault {
			events = append(events, e)
			continue
		}
		s.note(e)
		s.hook("noted")
	}
	if len(s.regions) > maxPieces {
		return events, fmt.Errorf("the monitor has its memory in more than %d pieces", maxPieces)
	}
	return events, nil
}

// serveAll serves faults, some by the helpers where there are many.
func (s *server) serveAll(ctx context.Context, events []event, buf []byte) error {
	if s.record != nil {
		for _, e := range events {
			s.record.add(s.guest, e)
		}
	}
	for i, e := range events {
		if s.threads > 1 && len(events)-i > 1 && i%s.threads != 0 {
			select {
			case s.jobs <- e:
				continue
			default: // they have enough to do
			}
		}
		if err := s.serve(e, buf); errors.Is(err, errAgain) {
			s.again = append(s.again, e)
		} else if err != nil {
			return err
		}
	}
	return ctx.Err()
}

func (s *server) serve(e event, buf []byte) error {
	around := s.around
	if s.record.active() {
		around = s.page // what is put in with it is not seen to be touched
	}
	return s.fault(e, around, buf)
}
