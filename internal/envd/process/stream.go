package process

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"time"

	"connectrpc.com/connect"

	rpc "github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/internal/envd/keepalive"
)

const (
	// offsetHeader is where in the output to begin, in a request, and where the
	// stream begins, in the answer.
	offsetHeader   = "Wrenn-Output-Offset"
	takeoverHeader = "Wrenn-Takeover"
	// inputHeader is how many bytes a call gave to the process before it failed.
	inputHeader = "Wrenn-Input-Written"
)

// placeOf returns where the client wants to begin. What the message says counts
// before what the headers say.
func placeOf(ctx context.Context, req *rpc.ConnectRequest) (place, error) {
	at := place{offset: req.Offset, takeover: req.GetTakeover()}
	info, ok := connect.CallInfoForHandlerContext(ctx)
	if !ok {
		return at, nil
	}
	if text := info.RequestHeader().Get(offsetHeader); text != "" && at.offset == nil {
		n, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			return place{}, connect.NewError(connect.CodeInvalidArgument,
				fmt.Errorf("header %s: %.50q is not a number of bytes", offsetHeader, text))
		}
		at.offset = &n
	}
	if text := info.RequestHeader().Get(takeoverHeader); text != "" && !at.takeover {
		wanted, err := strconv.ParseBool(text)
		if err != nil {
			return place{}, connect.NewError(connect.CodeInvalidArgument,
				fmt.Errorf("header %s: %.50q is neither true nor false", takeoverHeader, text))
		}
		at.takeover = wanted
	}
	return at, nil
}

// startEvent is the first event of a stream. Only clients that gave an offset
// know its fields about the reader.
func startEvent(e *entry, r *reader) *rpc.ProcessEvent {
	start := &rpc.ProcessEvent_StartEvent{Pid: uint32(e.pid)}
	if r != nil {
		start.Offset = &r.start
		if r.lost > 0 {
			start.Lost = &r.lost
		}
	}
	return &rpc.ProcessEvent{Event: &rpc.ProcessEvent_Start{Start: start}}
}

// follow sends a process's events to one client until the process ends, the
// client goes or another one takes over.
func (s *Service) follow(ctx context.Context, r *reader, first *rpc.ProcessEvent, send func(*rpc.ProcessEvent) error) error {
	defer r.detach()
	if info, ok := connect.CallInfoForHandlerContext(ctx); ok {
		info.ResponseHeader().Set(offsetHeader, strconv.FormatInt(r.start, 10))
	}
	limitWrites(ctx)
	if err := send(first); err != nil {
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
		k, data, end, err := r.next()
		if err != nil {
			return connect.NewError(connect.CodeAborted, err)
		}
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
		if err := flush(ctx); err != nil {
			return err
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
	var written inputCount
	if err := e.send(ctx, req.GetInput(), &written); err != nil {
		return nil, written.tell(err)
	}
	return &rpc.SendInputResponse{}, nil
}

// StreamInput writes a stream of chunks to one process. An error says how much of
// them all was written.
func (s *Service) StreamInput(ctx context.Context, stream *connect.ClientStream[rpc.StreamInputRequest]) (*rpc.StreamInputResponse, error) {
	var written inputCount
	if err := s.streamInput(ctx, stream, &written); err != nil {
		return nil, written.tell(err)
	}
	return &rpc.StreamInputResponse{}, nil
}

func (s *Service) streamInput(ctx context.Context, stream *connect.ClientStream[rpc.StreamInputRequest], written *inputCount) error {
	var e *entry
	for stream.Receive() {
		switch event := stream.Msg().GetEvent().(type) {
		case *rpc.StreamInputRequest_Start:
			found, err := s.find(event.Start.GetProcess(), false)
			if err != nil {
				return err
			}
			e = found
		case *rpc.StreamInputRequest_Data:
			if e == nil {
				return connect.NewError(connect.CodeInvalidArgument, errors.New("the first event must be start"))
			}
			if err := e.send(ctx, event.Data.GetInput(), written); err != nil {
				return err
			}
		case *rpc.StreamInputRequest_Keepalive:
		default:
			return connect.NewError(connect.CodeInvalidArgument, errors.New("event of unknown type"))
		}
	}
	return stream.Err()
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
		return nil, inputError(fmt.Errorf("close stdin: %w", err))
	}
	return &rpc.CloseStdinResponse{}, nil
}

// inputCount counts the bytes that a call has given to a process, of those it was
// to give so far.
type inputCount struct{ written, wanted int }

// tell adds the count to the error that ends the call: whoever sends the rest must
// know where it begins, or it comes twice.
func (c *inputCount) tell(err error) error {
	if failure := (*connect.Error)(nil); errors.As(err, &failure) {
		failure.Meta().Set(inputHeader, strconv.Itoa(c.written))
	}
	return err
}

func (e *entry) send(ctx context.Context, in *rpc.ProcessInput, count *inputCount) error {
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
	n, err := e.in.write(ctx, data)
	count.written += n
	count.wanted += len(data)
	if err == nil {
		return nil
	}
	return inputError(fmt.Errorf("wrote %d of %d bytes: %w", count.written, count.wanted, err))
}

// inputError gives an error of an input its code.
func inputError(err error) *connect.Error {
	code := connect.CodeInternal
	switch {
	case errors.Is(err, errGone):
		code = connect.CodeNotFound
	case errors.Is(err, context.DeadlineExceeded):
		code = connect.CodeDeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = connect.CodeCanceled
	}
	return connect.NewError(code, err)
}
