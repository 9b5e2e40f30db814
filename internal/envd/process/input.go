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

// write writes all of data, or fails. When ctx ends meanwhile a part may have
// been written.
func (in *input) write(ctx context.Context, data []byte) error {
	select {
	case in.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-in.turn }()
	if in.closed || in.gone.Load() {
		return errInputClosed
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		in.file.SetWriteDeadline(time.Unix(1, 0)) // in the past: ends the write
	})
	_, err := in.file.Write(data)
	if !stop() {
		<-interrupted
		in.file.SetWriteDeadline(time.Time{})
	}
	if errors.Is(err, os.ErrDeadlineExceeded) {
		if in.gone.Load() {
			return errGone
		}
		return ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("write input: %w", err)
	}
	return nil
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
