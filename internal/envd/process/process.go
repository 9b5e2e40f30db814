package process

import (
	"os"
	"strconv"
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

const (
	// drainQuiet is how long nothing may come from a process's outputs after it
	// has exited before its output counts as complete, when another process still
	// holds them open.
	drainQuiet = 50 * time.Millisecond
	// drainLimit bounds that for a child that keeps writing.
	drainLimit = time.Second
)

// Process is a started program: a session or a process group of its own.
type Process struct {
	pid      int
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
	delivered atomic.Int64 // bytes given to the output
	busy      atomic.Bool  // has read something that is not delivered yet
	eof       atomic.Bool
}

// supervise runs the process to its end: pumps its output, and records the end
// after the last of it. It calls ended before clients can see the end.
func (p *Process) supervise(exited <-chan syscall.WaitStatus, ended func(End)) {
	for _, s := range p.streams {
		go p.pump(s)
	}
	status := <-exited
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
	buf := make([]byte, maxChunk)
	for {
		n, err := s.file.Read(buf)
		if n > 0 {
			s.busy.Store(true)
			p.out.write(s.kind, buf[:n])
			s.delivered.Add(int64(n))
			s.busy.Store(false)
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

// drain waits until the output of the process, which has exited, is complete:
// usually at once, when its outputs are closed. Children that hold them open may
// have more to say (tee at the end of a script) or be there to stay (a server in
// the background), so they get a moment.
func (p *Process) drain() {
	targets := make([]int64, len(p.streams))
	for i, s := range p.streams {
		targets[i] = s.delivered.Load() + maxChunk + s.pending()
	}
	limit := time.Now().Add(drainLimit)
	quiet := time.NewTimer(drainQuiet)
	defer quiet.Stop()
	for {
		allEOF, idle, reached := true, true, true
		for i, s := range p.streams {
			if s.eof.Load() {
				continue
			}
			allEOF = false
			reached = reached && s.delivered.Load() >= targets[i]
			idle = idle && !s.busy.Load() && s.pending() == 0
		}
		if allEOF || (reached && time.Now().After(limit)) {
			return
		}
		select {
		case <-p.activity:
			quiet.Reset(drainQuiet)
		case <-quiet.C:
			if idle {
				return
			}
			quiet.Reset(drainQuiet)
		}
	}
}

// pending returns how many bytes wait to be read.
func (s *stream) pending() int64 {
	conn, err := s.file.SyscallConn()
	if err != nil {
		return 0
	}
	var n int
	_ = conn.Control(func(fd uintptr) { n, _ = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	return int64(n)
}

// Signal sends sig to the process and the others of its group.
func (p *Process) Signal(sig syscall.Signal) error { return p.reaper.signal(p.pid, sig) }
