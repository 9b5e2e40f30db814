package process

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"
)

var errInputClosed = errors.New("input is closed")

// input writes to a process, one writer at a time and in the order they came. A
// process that does not read makes the writer wait; nothing is dropped.
type input struct {
	turn   chan struct{} // holds one token: whose turn it is
	file   *os.File
	closed bool        // guarded by turn
	gone   atomic.Bool // the process has ended
}

func newInput(file *os.File) *input {
	return &input{turn: make(chan struct{}, 1), file: file}
}

// write writes all of data, or fails and says how much of it was written: when ctx
// ends or the process does, it may be a part.
func (in *input) write(ctx context.Context, data []byte) (int, error) {
	select {
	case in.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	defer func() { <-in.turn }()
	switch {
	case in.gone.Load():
		return 0, errGone
	case in.closed:
		return 0, errInputClosed
	case ctx.Err() != nil:
		return 0, ctx.Err()
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		in.file.SetWriteDeadline(time.Unix(1, 0)) // in the past: ends the write
	})
	n, err := in.file.Write(data)
	if !stop() {
		<-interrupted
		in.file.SetWriteDeadline(time.Time{})
	}
	switch {
	case err == nil:
		return n, nil
	case in.gone.Load():
		return n, errGone
	case errors.Is(err, os.ErrDeadlineExceeded):
		return n, ctx.Err()
	}
	return n, fmt.Errorf("write input: %w", err)
}

// close gives the process end of file. A write under way is completed first.
func (in *input) close(ctx context.Context) error {
	select {
	case in.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-in.turn }()
	if in.closed {
		return nil
	}
	in.closed = true
	return in.file.Close()
}

// abort ends the write under way and refuses further ones: the process is gone.
func (in *input) abort() {
	in.gone.Store(true)
	in.file.SetWriteDeadline(time.Unix(1, 0))
	in.turn <- struct{}{}
	defer func() { <-in.turn }()
	if !in.closed {
		in.closed = true
		in.file.Close()
	}
}
