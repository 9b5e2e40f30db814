package process

import (
	"errors"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Size is the size of a terminal in characters.
type Size struct{ Cols, Rows uint32 }

// End says how a process ended.
type End struct {
	Code   int // exit code, -1 when a signal ended it
	Exited bool
	Status string // "exit status 1", "signal: killed"
}

func endOf(status syscall.WaitStatus) End {
	if status.Exited() {
		return End{Code: status.ExitStatus(), Exited: true, Status: "exit status " + strconv.Itoa(status.ExitStatus())}
	}
	text := "signal: " + status.Signal().String()
	if status.CoreDump() {
		text += " (core dumped)"
	}
	return End{Code: -1, Status: text}
}

// Process is a started program: a session or a process group of its own.
type Process struct {
	pid      int
	child    *child
	reaper   *Reaper
	out      *output
	in       *input   // nil when stdin is /dev/null
	terminal *os.File // master; nil without a terminal
	streams  []*stream
	activity chan struct{} // poked whenever output came or a stream ended
	done     chan struct{} // closed when the process has ended and its output is complete
}

// stream is one of a process's outputs and how far it has been read.
type stream struct {
	kind      kind
	file      *os.File
	mu        sync.Mutex   // held over a read, so that taken and what is left add up
	taken     int64        // bytes read; guarded by mu
	delivered atomic.Int64 // bytes given to the output
	eof       atomic.Bool
	ended     atomic.Bool // the process has
}

// supervise runs the process to its end: pumps its output, and records the end
// after the last of it. It calls ended before clients can see the end.
func (p *Process) supervise(exited <-chan syscall.WaitStatus, ended func(End)) {
	for _, s := range p.streams {
		go p.pump(s)
	}
	status := <-exited
	for _, s := range p.streams {
		s.end()
	}
	p.drain()
	end := endOf(status)
	ended(end)
	p.out.finish(end)
	if p.in != nil {
		p.in.abort()
	}
	close(p.done)
}

// pump reads a stream until nobody holds its other end any more. After the
// process's end what comes is thrown away: its background children must neither
// block on a full pipe nor die of a closed one.
func (p *Process) pump(s *stream) {
	defer s.file.Close()
	for {
		buf, n, err := s.read()
		if n > 0 {
			p.out.write(s.kind, buf[:n])
			s.delivered.Add(int64(n))
		}
		if buf != nil {
			chunks.Put(buf)
		}
		if err != nil { // EOF; EIO from a terminal that everybody has closed
			s.eof.Store(true)
		}
		select {
		case p.activity <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// chunks are buffers for output. A process that says nothing holds none.
var chunks = sync.Pool{New: func() any { return new([maxChunk]byte) }}

// end tells that the process has ended. Before that a terminal that nobody holds
// is no end: the program has closed it, and may open it again.
func (s *stream) end() {
	s.ended.Store(true)
	if s.kind == terminal {
		s.file.SetReadDeadline(time.Unix(1, 0)) // in the past: read looks again
	}
}

// read waits for output and reads some, into a buffer that the caller puts back.
func (s *stream) read() (buf *[maxChunk]byte, n int, err error) {
	buf, n, err = s.readOnce()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.file.SetReadDeadline(time.Time{})
		buf, n, err = s.readOnce()
	}
	return buf, n, err
}

func (s *stream) readOnce() (buf *[maxChunk]byte, n int, err error) {
	conn, err := s.file.SyscallConn()
	if err != nil {
		return nil, 0, err
	}
	waitErr := conn.Read(func(fd uintptr) bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		if buf == nil {
			buf = chunks.Get().(*[maxChunk]byte)
		}
		n, err = readNow(int(fd), buf[:])
		if errors.Is(err, unix.EIO) {
			// Linux looks for output first and whether the terminal is closed
			// then: what was written and closed in between is still there.
			n, err = readNow(int(fd), buf[:])
		}
		s.taken += int64(max(n, 0))
		if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EIO) && !s.ended.Load() {
			chunks.Put(buf)
			buf = nil
			return false
		}
		return true
	})
	switch {
	case waitErr != nil:
		return nil, 0, waitErr
	case err == nil && n == 0:
		return buf, 0, io.EOF
	}
	return buf, max(n, 0), err
}

func readNow(fd int, buf []byte) (n int, err error) {
	for {
		if n, err = unix.Read(fd, buf); err != unix.EINTR {
			return n, err
		}
	}
}

// Signal sends sig to the process and the others of its group, SIGKILL to all
// that it has started.
func (p *Process) Signal(sig syscall.Signal) error { return p.reaper.signal(p.child, sig) }
