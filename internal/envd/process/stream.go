package process

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"

	rpc "github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/internal/envd/keepalive"
)

// follow sends a process's events to one client until the process ends or the
// client goes.
func (s *Service) follow(ctx context.Context, e *entry, r *reader, send func(*rpc.ProcessEvent) error) error {
	defer r.detach()
	err := send(&rpc.ProcessEvent{Event: &rpc.ProcessEvent_Start{Start: &rpc.ProcessEvent_StartEvent{Pid: uint32(e.pid)}}})
	if err != nil {
		return err
	}
	interval := keepalive.Interval(ctx)
	silent := time.NewTimer(interval)
	defer silent.Stop()
	for {
		// A process killed at the deadline ends about when the stream does. The
		// client is to see the deadline, not the kill.
		if deadline, ok := ctx.Deadline(); ok && !time.Now().Before(deadline) {
			return connect.NewError(connect.CodeDeadlineExceeded, context.DeadlineExceeded)
		}
		k, data, end := r.next()
		if end != nil {
			return send(endEvent(*end))
		}
		if len(data) > 0 {
			if err := send(dataEvent(k, data)); err != nil {
				return err
			}
			silent.Reset(interval)
			continue
		}
		select {
		case <-r.wake:
		case <-silent.C:
			if err := send(&rpc.ProcessEvent{Event: &rpc.ProcessEvent_Keepalive{Keepalive: &rpc.ProcessEvent_KeepAlive{}}}); err != nil {
				return err
			}
			silent.Reset(interval)
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func dataEvent(k kind, data []byte) *rpc.ProcessEvent {
	d := &rpc.ProcessEvent_DataEvent{}
	switch k {
	case stdout:
		d.Output = &rpc.ProcessEvent_DataEvent_Stdout{Stdout: data}
	case stderr:
		d.Output = &rpc.ProcessEvent_DataEvent_Stderr{Stderr: data}
	case terminal:
		d.Output = &rpc.ProcessEvent_DataEvent_Pty{Pty: data}
	}
	return &rpc.ProcessEvent{Event: &rpc.ProcessEvent_Data{Data: d}}
}

func endEvent(end End) *rpc.ProcessEvent {
	e := &rpc.ProcessEvent_EndEvent{ExitCode: int32(end.Code), Exited: end.Exited, Status: end.Status}
	if end.Code != 0 {
		e.Error = &end.Status
	}
	return &rpc.ProcessEvent{Event: &rpc.ProcessEvent_End{End: e}}
}

// SendInput writes to stdin or the terminal.
func (s *Service) SendInput(ctx context.Context, req *rpc.SendInputRequest) (*rpc.SendInputResponse, error) {
	e, err := s.find(req.GetProcess(), false)
	if err != nil {
		return nil, err
	}
	if err := e.send(ctx, req.GetInput()); err != nil {
		return nil, err
	}
	return &rpc.SendInputResponse{}, nil
}

// StreamInput writes a stream of chunks to one process.
func (s *Service) StreamInput(ctx context.Context, stream *connect.ClientStream[rpc.StreamInputRequest]) (*rpc.StreamInputResponse, error) {
	var e *entry
	for stream.Receive() {
		switch event := stream.Msg().GetEvent().(type) {
		case *rpc.StreamInputRequest_Start:
			found, err := s.find(event.Start.GetProcess(), false)
			if err != nil {
				return nil, err
			}
			e = found
		case *rpc.StreamInputRequest_Data:
			if e == nil {
				return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("the first event must be start"))
			}
			if err := e.send(ctx, event.Data.GetInput()); err != nil {
				return nil, err
			}
		case *rpc.StreamInputRequest_Keepalive:
		default:
			return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("event of unknown type"))
		}
	}
	if err := stream.Err(); err != nil {
		return nil, err
	}
	return &rpc.StreamInputResponse{}, nil
}

// CloseStdin gives the process end of file.
func (s *Service) CloseStdin(ctx context.Context, req *rpc.CloseStdinRequest) (*rpc.CloseStdinResponse, error) {
	e, err := s.find(req.GetProcess(), false)
	if err != nil {
		return nil, err
	}
	if e.terminal != nil {
		return nil, connect.NewError(connect.CodeUnimplemented, errors.New("a terminal's input cannot be closed: send Ctrl-D (0x04)"))
	}
	if e.in == nil {
		return &rpc.CloseStdinResponse{}, nil
	}
	if err := e.in.close(ctx); err != nil {
		return nil, connect.NewError(connect.CodeUnknown, fmt.Errorf("close stdin: %w", err))
	}
	return &rpc.CloseStdinResponse{}, nil
}

func (e *entry) send(ctx context.Context, in *rpc.ProcessInput) error {
	var data []byte
	switch input := in.GetInput().(type) {
	case *rpc.ProcessInput_Stdin:
		if e.terminal != nil {
			return connect.NewError(connect.CodeInternal, errors.New("the process has a terminal: send pty input"))
		}
		data = input.Stdin
	case *rpc.ProcessInput_Pty:
		if e.terminal == nil {
			return connect.NewError(connect.CodeInternal, errors.New("the process has no terminal: send stdin input"))
		}
		data = input.Pty
	default:
		return connect.NewError(connect.CodeInvalidArgument, errors.New("no input given: want stdin or pty"))
	}
	if e.in == nil {
		return connect.NewError(connect.CodeInternal, errors.New("stdin is not open: the process was started without it"))
	}
	err := e.in.write(ctx, data)
	if err != nil && ctx.Err() == nil {
		return connect.NewError(connect.CodeInternal, err)
	}
	return err
}
