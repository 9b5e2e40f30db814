// Package process serves the processes and terminals of the sandbox.
package process

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	rpc "github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/internal/envd/settings"
	"github.com/wrenn/wrenn/internal/envd/user"
)

// Service implements the RPC service process.Process.
type Service struct {
	reaper   *Reaper
	settings *settings.Settings
	log      *slog.Logger
	table    table
}

// NewService returns the service; reaper starts its processes.
func NewService(reaper *Reaper, s *settings.Settings, log *slog.Logger) *Service {
	return &Service{reaper: reaper, settings: s, log: log}
}

// Start runs a command and streams its output.
func (s *Service) Start(ctx context.Context, req *rpc.StartRequest, stream *connect.ServerStream[rpc.StartResponse]) error {
	e, r, err := s.start(ctx, req)
	if err != nil {
		return err
	}
	if deadline, ok := ctx.Deadline(); ok {
		// The deadline is the process's, not only the stream's: it counts also
		// after the client has gone.
		timer := time.AfterFunc(time.Until(deadline), func() { _ = e.Signal(syscall.SIGKILL) })
		go func() {
			<-e.done
			timer.Stop()
		}()
	}
	return s.follow(ctx, r, startEvent(e, nil), func(ev *rpc.ProcessEvent) error {
		return stream.Send(&rpc.StartResponse{Event: ev})
	})
}

// Connect streams what a process writes from now on, or from an offset on.
func (s *Service) Connect(ctx context.Context, req *rpc.ConnectRequest, stream *connect.ServerStream[rpc.ConnectResponse]) error {
	e, err := s.find(req.GetProcess(), true)
	if err != nil {
		return err
	}
	at, err := placeOf(ctx, req)
	if err != nil {
		return err
	}
	r, err := e.out.attach(at)
	if err != nil {
		return err
	}
	first := startEvent(e, nil)
	if at.offset != nil {
		first = startEvent(e, r)
	}
	return s.follow(ctx, r, first, func(ev *rpc.ProcessEvent) error {
		return stream.Send(&rpc.ConnectResponse{Event: ev})
	})
}

// List returns the live processes.
func (s *Service) List(context.Context, *rpc.ListRequest) (*rpc.ListResponse, error) {
	resp := &rpc.ListResponse{}
	for _, e := range s.table.running() {
		resp.Processes = append(resp.Processes, &rpc.ProcessInfo{Config: e.config, Pid: uint32(e.pid), Tag: e.tag})
	}
	return resp, nil
}

// Update changes the size of a terminal.
func (s *Service) Update(_ context.Context, req *rpc.UpdateRequest) (*rpc.UpdateResponse, error) {
	e, err := s.find(req.GetProcess(), false)
	if err != nil {
		return nil, err
	}
	if size := req.GetPty().GetSize(); size != nil {
		if e.terminal == nil {
			return nil, connect.NewError(connect.CodeInternal, errors.New("the process has no terminal"))
		}
		if err := resize(e.terminal, Size{Cols: size.GetCols(), Rows: size.GetRows()}); err != nil {
			return nil, connect.NewError(connect.CodeInternal, err)
		}
	}
	return &rpc.UpdateResponse{}, nil
}

// SendSignal signals a process and its group.
func (s *Service) SendSignal(_ context.Context, req *rpc.SendSignalRequest) (*rpc.SendSignalResponse, error) {
	var sig syscall.Signal
	switch req.GetSignal() {
	case rpc.Signal_SIGNAL_SIGKILL:
		sig = syscall.SIGKILL
	case rpc.Signal_SIGNAL_SIGTERM:
		sig = syscall.SIGTERM
	default:
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("invalid signal: %s", req.GetSignal()))
	}
	e, err := s.find(req.GetProcess(), false)
	if err != nil {
		return nil, err
	}
	if err := e.Signal(sig); errors.Is(err, errGone) {
		return nil, notFound(req.GetProcess())
	} else if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return &rpc.SendSignalResponse{}, nil
}

func (s *Service) find(selector *rpc.ProcessSelector, ended bool) (*entry, error) {
	if selector.GetSelector() == nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("no process given: want its pid or its tag"))
	}
	if e := s.table.find(selector, ended); e != nil {
		return e, nil
	}
	return nil, notFound(selector)
}

func notFound(selector *rpc.ProcessSelector) error {
	if tag, ok := selector.GetSelector().(*rpc.ProcessSelector_Tag); ok {
		return connect.NewError(connect.CodeNotFound, fmt.Errorf("process with tag %.200s not found", tag.Tag))
	}
	return connect.NewError(connect.CodeNotFound, fmt.Errorf("process with pid %d not found", selector.GetPid()))
}

// start checks the request and starts the process. The reader has it all: it is
// there before the first byte, however much is written at once.
func (s *Service) start(ctx context.Context, req *rpc.StartRequest) (*entry, *reader, error) {
	c, err := s.command(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	p, exited, err := spawn(s.reaper, c)
	if err != nil {
		s.log.Warn("process not started", "cmd", req.GetProcess().GetCmd(), "error", err)
		return nil, nil, startError(c, err)
	}
	e := &entry{Process: p, config: req.GetProcess(), tag: req.Tag}
	r, _ := p.out.attach(place{}) // fails for offsets only
	s.table.add(e)
	// Arguments and variables may hold secrets: they are not logged.
	s.log.Info("process started", "pid", p.pid, "cmd", c.path, "user", c.user.Name)
	go p.supervise(exited, func(end End) {
		s.table.retire(e)
		s.log.Info("process ended", "pid", p.pid, "cmd", c.path, "user", c.user.Name, "exit_code", end.Code, "status", end.Status)
	})
	return e, r, nil
}

func (s *Service) command(ctx context.Context, req *rpc.StartRequest) (command, error) {
	invalid := func(err error) (command, error) {
		return command{}, connect.NewError(connect.CodeInvalidArgument, err)
	}
	config := req.GetProcess()
	u, err := user.LookupWithGroups(user.NameFrom(ctx, s.settings.User()))
	if unknown := (user.UnknownError{}); errors.As(err, &unknown) {
		return command{}, connect.NewError(connect.CodeUnauthenticated, unknown)
	} else if err != nil {
		return command{}, connect.NewError(connect.CodeInternal, err)
	}
	for _, path := range []string{config.GetCmd(), config.GetCwd()} {
		if len(path) >= unix.PathMax {
			return invalid(fmt.Errorf("file name too long: %.50q… has %d bytes", path, len(path)))
		}
	}
	dir, err := user.ResolvePath(config.GetCwd(), u.Home, s.settings.Workdir())
	if err != nil {
		return invalid(err)
	}
	if err := checkDir(dir); err != nil {
		return invalid(err)
	}
	for name := range config.GetEnvs() {
		if name == "" || strings.ContainsAny(name, "=\x00") {
			return invalid(fmt.Errorf("variable name %.100q is empty or contains = or NUL", name))
		}
	}
	env := environment(u, s.settings.Env(), config.GetEnvs())
	path, err := lookPath(config.GetCmd(), dir, env)
	if err != nil {
		return invalid(err)
	}
	c := command{path: path, argv0: config.GetCmd(), args: config.GetArgs(), env: env, dir: dir, user: u}
	c.stdin = req.Stdin == nil || req.GetStdin()
	if req.GetPty() != nil {
		c.size = &Size{Cols: req.GetPty().GetSize().GetCols(), Rows: req.GetPty().GetSize().GetRows()}
	}
	return c, nil
}

func startError(c command, err error) error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, syscall.ENOMEM), errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE):
		code = connect.CodeResourceExhausted
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.E2BIG),
		errors.Is(err, syscall.EINVAL), errors.Is(err, syscall.ENOEXEC), errors.Is(err, syscall.ENOTDIR):
		code = connect.CodeInvalidArgument
	}
	return connect.NewError(code, fmt.Errorf("start %.200q: %w", c.argv0, err))
}
