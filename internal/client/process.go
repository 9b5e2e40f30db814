package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"syscall"

	"connectrpc.com/connect"

	rpc "github.com/wrenn/wrenn/api/proto/process"
)

// keepaliveSeconds is how long an output stream may be silent. Proxies on the way
// drop connections that are silent for longer than a minute.
const keepaliveSeconds = "50"

// Size is the size of a terminal in characters.
type Size struct{ Cols, Rows uint32 }

// Command is a program to run in a sandbox.
type Command struct {
	Path  string   // looked up in the sandbox's PATH when it has no slash
	Args  []string // without the program itself
	Env   map[string]string
	Dir   string // empty: the template's working directory
	User  string // empty: the template's default user
	Stdin bool   // whether Input will be used; false gives the program /dev/null
	Size  *Size  // a terminal of this size; nil: none
}

// Exit says how a process ended.
type Exit struct {
	Code   int            // exit code, meaningless when a signal ended it
	Signal syscall.Signal // the signal that ended it, or 0
}

// Status returns the exit status as shells show it: the code, or 128 and the
// signal's number.
func (e Exit) Status() int {
	if e.Signal != 0 {
		return 128 + int(e.Signal)
	}
	return e.Code
}

// StartError is a program that could not be started.
type StartError struct {
	Message       string // the guest agent's words
	NotFound      bool   // there is no such program
	NotExecutable bool   // there is, but it cannot be executed
	err           error
}

func (e *StartError) Error() string { return e.Message }
func (e *StartError) Unwrap() error { return e.err }

// Process is a process in a sandbox, and one stream of its output. Wait or Close
// must be called.
type Process struct {
	PID uint32

	sandbox *Sandbox
	pty     bool
	ctx     context.Context // of the streams
	cancel  context.CancelFunc
	events  events
	close   sync.Once
}

// events is a stream of process events: of Start or of Connect.
type events interface {
	next() (*rpc.ProcessEvent, bool)
	err() error
	close() error
}

// Start starts a program and returns when it runs. The context bounds the stream
// of output; a deadline in it also ends the process.
func (s *Sandbox) Start(ctx context.Context, c Command) (*Process, error) {
	req := &rpc.StartRequest{
		Process: &rpc.ProcessConfig{Cmd: c.Path, Args: c.Args, Envs: c.Env},
		Stdin:   &c.Stdin,
	}
	if c.Dir != "" {
		req.Process.Cwd = &c.Dir
	}
	if c.Size != nil {
		req.Pty = &rpc.PTY{Size: &rpc.PTY_Size{Cols: c.Size.Cols, Rows: c.Size.Rows}}
	}
	p := &Process{sandbox: s, pty: c.Size != nil}
	p.ctx, p.cancel = context.WithCancel(ctx)
	stream, err := s.processes.Start(s.streamContext(p.ctx, c.User), req)
	if err != nil {
		p.cancel()
		return nil, startError(err)
	}
	p.events = startEvents{stream}
	if err := p.awaitStart(); err != nil {
		return nil, startError(err)
	}
	return p, nil
}

// Attach returns the running process with the given pid; what it wrote before is
// not repeated. pty says whether it has a terminal.
func (s *Sandbox) Attach(ctx context.Context, pid uint32, pty bool) (*Process, error) {
	p := &Process{sandbox: s, pty: pty}
	p.ctx, p.cancel = context.WithCancel(ctx)
	stream, err := s.processes.Connect(s.streamContext(p.ctx, ""), &rpc.ConnectRequest{Process: selector(pid)})
	if err != nil {
		p.cancel()
		return nil, fmt.Errorf("connect to process %d: %w", pid, err)
	}
	p.events = connectEvents{stream}
	if err := p.awaitStart(); err != nil {
		return nil, fmt.Errorf("connect to process %d: %w", pid, err)
	}
	return p, nil
}

func (s *Sandbox) streamContext(ctx context.Context, user string) context.Context {
	ctx, call := connect.NewClientContext(ctx)
	s.address(call.RequestHeader(), user)
	call.RequestHeader().Set("Keepalive-Ping-Interval", keepaliveSeconds)
	return ctx
}

// awaitStart takes the first event. On failure the process is closed.
func (p *Process) awaitStart() error {
	event, ok := p.events.next()
	if !ok {
		err := p.events.err()
		p.Close()
		if err == nil {
			err = io.ErrUnexpectedEOF
		}
		return err
	}
	start := event.GetStart()
	if start == nil {
		p.Close()
		return fmt.Errorf("expected the start event, got %T", event.GetEvent())
	}
	p.PID = start.GetPid()
	return nil
}

// startError tells apart what a shell tells apart: no such program, one that
// cannot be executed, anything else.
func startError(err error) error {
	var rpcErr *connect.Error
	if !errors.As(err, &rpcErr) || rpcErr.Code() != connect.CodeInvalidArgument {
		return fmt.Errorf("start process: %w", err)
	}
	text := rpcMessage(rpcErr)
	e := &StartError{Message: text, err: err}
	if strings.HasPrefix(text, "cwd ") || strings.HasPrefix(text, "check cwd") {
		return e
	}
	e.NotFound = strings.Contains(text, "not found in PATH") ||
		strings.Contains(text, syscall.ENOENT.Error()) || strings.Contains(text, syscall.ENOTDIR.Error())
	e.NotExecutable = strings.Contains(text, syscall.EACCES.Error()) ||
		strings.Contains(text, syscall.ENOEXEC.Error()) || strings.Contains(text, syscall.EISDIR.Error())
	return e
}

// Wait copies the process's output to the writers as it comes, a terminal's to
// stdout, and returns how the process ended. A writer that blocks holds the
// process back. The error is an OutputError when a writer failed, else that of
// the stream; the process may then be running still.
func (p *Process) Wait(stdout, stderr io.Writer) (Exit, error) {
	defer p.Close()
	for {
		event, ok := p.events.next()
		if !ok {
			err := p.events.err()
			if err == nil {
				err = io.ErrUnexpectedEOF
			}
			return Exit{}, fmt.Errorf("read output: %w", err)
		}
		switch e := event.GetEvent().(type) {
		case *rpc.ProcessEvent_Data:
			var err error
			switch output := e.Data.GetOutput().(type) {
			case *rpc.ProcessEvent_DataEvent_Stdout:
				_, err = stdout.Write(output.Stdout)
			case *rpc.ProcessEvent_DataEvent_Stderr:
				_, err = stderr.Write(output.Stderr)
			case *rpc.ProcessEvent_DataEvent_Pty:
				_, err = stdout.Write(output.Pty)
			}
			if err != nil {
				return Exit{}, &OutputError{err}
			}
		case *rpc.ProcessEvent_End:
			return exitOf(e.End), nil
		}
	}
}

// Close leaves the process: its output is not read any more, its input ends where
// it is. The process goes on.
func (p *Process) Close() {
	p.close.Do(func() {
		p.cancel()
		p.events.close()
	})
}

// Signal sends SIGTERM or SIGKILL, the two that the guest agent knows.
func (p *Process) Signal(ctx context.Context, sig syscall.Signal) error {
	_, err := p.sandbox.processes.SendSignal(p.sandbox.Context(ctx, ""),
		&rpc.SendSignalRequest{Process: selector(p.PID), Signal: rpc.Signal(sig)})
	if err != nil {
		return fmt.Errorf("signal process: %w", err)
	}
	return nil
}

// Resize tells a process with a terminal the terminal's new size.
func (p *Process) Resize(ctx context.Context, size Size) error {
	_, err := p.sandbox.processes.Update(p.sandbox.Context(ctx, ""), &rpc.UpdateRequest{
		Process: selector(p.PID), Pty: &rpc.PTY{Size: &rpc.PTY_Size{Cols: size.Cols, Rows: size.Rows}},
	})
	if err != nil {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

func selector(pid uint32) *rpc.ProcessSelector {
	return &rpc.ProcessSelector{Selector: &rpc.ProcessSelector_Pid{Pid: pid}}
}

// exitOf reads how a process ended. The signal is known only by its name.
func exitOf(end *rpc.ProcessEvent_EndEvent) Exit {
	if end.GetExited() {
		return Exit{Code: int(end.GetExitCode())}
	}
	name, ok := strings.CutPrefix(end.GetStatus(), "signal: ")
	name = strings.TrimSuffix(name, " (core dumped)")
	if ok {
		for sig := syscall.Signal(1); sig <= 64; sig++ {
			if sig.String() == name {
				return Exit{Code: -1, Signal: sig}
			}
		}
	}
	return Exit{Code: 255}
}

type startEvents struct {
	stream *connect.ServerStreamForClient[rpc.StartResponse]
}

func (s startEvents) next() (*rpc.ProcessEvent, bool) {
	ok := s.stream.Receive()
	return s.stream.Msg().GetEvent(), ok
}
func (s startEvents) err() error   { return s.stream.Err() }
func (s startEvents) close() error { return s.stream.Close() }

type connectEvents struct {
	stream *connect.ServerStreamForClient[rpc.ConnectResponse]
}

func (s connectEvents) next() (*rpc.ProcessEvent, bool) {
	ok := s.stream.Receive()
	return s.stream.Msg().GetEvent(), ok
}
func (s connectEvents) err() error   { return s.stream.Err() }
func (s connectEvents) close() error { return s.stream.Close() }
