// Package accesslog writes one line of JSON for each request of the data plane.
//
// Writing never holds a request up: a line is put into a buffer in memory, and a
// goroutine of the log's own writes that out. When the disk is too slow or full,
// lines are dropped and counted.
package accesslog

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

const (
	// flushInterval is the longest that a line stays in memory.
	flushInterval = 500 * time.Millisecond
	// maxPending bounds what waits to be written, in bytes. Another as much may be
	// on its way to the disk.
	maxPending = 1 << 20
	// warnInterval is the least time between two warnings about dropped lines.
	warnInterval = time.Minute
)

// Stdout is the path that stands for standard output.
const Stdout = "-"

// Log is an access log. A nil Log takes lines and does nothing.
type Log struct {
	log *slog.Logger
	out sink

	mu      sync.Mutex // guards the following
	pending []byte     // whole lines
	waiting int        // how many
	closed  bool
	written int64 // lines
	dropped int64

	full chan struct{} // pending is half full
	stop chan struct{}
	done chan struct{} // the goroutine has ended

	// The goroutine's own:
	spare  []byte // the buffer that pending is changed for
	warned time.Time
	told   int64 // of dropped, by the last warning
}

// sink is where lines go.
type sink interface {
	// write writes whole lines. With an error it says how many were lost.
	write(lines []byte) (lost int, err error)
	Close() error
}

// Open opens the log at path, to append to it; Stdout is standard output. A file is
// set aside as path.1 when it would get larger than 64 MiB. What goes wrong later is
// said to log.
func Open(path string, log *slog.Logger) (*Log, error) {
	var out sink
	var err error
	if path == Stdout {
		out, err = openStdout()
	} else {
		out, err = openFile(path, maxSize)
	}
	if err != nil {
		return nil, fmt.Errorf("open access log: %w", err)
	}
	return start(out, log), nil
}

func start(out sink, log *slog.Logger) *Log {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	l := &Log{log: log, out: out, full: make(chan struct{}, 1), stop: make(chan struct{}), done: make(chan struct{})}
	go l.run()
	return l
}

// Write adds a line. It does not wait for the disk.
func (l *Log) Write(e *Entry) {
	if l == nil {
		return
	}
	var onStack [1024]byte
	line := e.appendTo(onStack[:0])
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed || len(l.pending)+len(line) > maxPending {
		l.dropped++
		return
	}
	before := len(l.pending)
	l.pending = append(l.pending, line...)
	l.waiting++
	if before < maxPending/2 && len(l.pending) >= maxPending/2 {
		select {
		case l.full <- struct{}{}:
		default: // said already
		}
	}
}

// Close writes out what is left and ends the log. It gives up when ctx is done: a
// disk may be stuck.
func (l *Log) Close(ctx context.Context) error {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	again := l.closed
	l.closed = true
	l.mu.Unlock()
	if !again {
		close(l.stop)
	}
	select {
	case <-l.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("close access log: %w", ctx.Err())
	}
}

func (l *Log) run() {
	defer close(l.done)
	tick := time.NewTicker(flushInterval)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-l.full:
		case <-l.stop:
			l.flush()
			if err := l.out.Close(); err != nil {
				l.log.Warn("close access log", "error", err)
			}
			return
		}
		l.flush()
	}
}

// flush writes out what is pending.
func (l *Log) flush() {
	l.mu.Lock()
	lines, count := l.pending, l.waiting
	l.pending, l.waiting = l.spare[:0], 0
	l.mu.Unlock()
	var lost int
	var err error
	if len(lines) > 0 {
		lost, err = l.out.write(lines)
	}
	l.spare = lines

	l.mu.Lock()
	l.written += int64(count - lost)
	l.dropped += int64(lost)
	dropped := l.dropped
	l.mu.Unlock()
	l.warn(dropped, err)
}

// warn says that lines are being dropped, now and then. Slow is what the disk is when
// it gives no error.
func (l *Log) warn(dropped int64, err error) {
	if (dropped == l.told && err == nil) || (!l.warned.IsZero() && time.Since(l.warned) < warnInterval) {
		return
	}
	why := "it is written too slowly"
	if err != nil {
		why = err.Error()
	}
	l.log.Warn("the access log is not written as it should be", "dropped_lines", dropped-l.told, "error", why)
	l.warned, l.told = time.Now(), dropped
}

func countLines(b []byte) int { return bytes.Count(b, []byte{'\n'}) }
