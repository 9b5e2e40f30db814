package client

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"

	"connectrpc.com/connect"

	rpc "github.com/wrenn/wrenn/api/proto/process"
)

// maxInput is the most that one message to a process carries, in bytes.
const maxInput = 64 << 10

// Input writes to a process's stdin or terminal, in order, over one stream. It is
// for one goroutine.
type Input struct {
	process *Process
	stream  *connect.ClientStreamForClientSimple[rpc.StreamInputRequest, rpc.StreamInputResponse]
	err     error
}

// Input returns the process's stdin or terminal.
func (p *Process) Input() *Input { return &Input{process: p} }

// Write sends data. It returns before the process has read it, but waits while
// much is on the way.
func (in *Input) Write(data []byte) (int, error) {
	written := 0
	for len(data) > 0 && in.err == nil {
		n := min(len(data), maxInput)
		if in.err = in.send(data[:n]); in.err == nil {
			written += n
		}
		data = data[n:]
	}
	return written, in.err
}

func (in *Input) send(data []byte) error {
	if in.stream == nil {
		p := in.process
		stream, err := p.sandbox.processes.StreamInput(p.sandbox.Context(p.ctx, ""))
		if err != nil {
			return fmt.Errorf("open input: %w", err)
		}
		in.stream = stream
		if err := in.sendEvent(&rpc.StreamInputRequest{Event: &rpc.StreamInputRequest_Start{
			Start: &rpc.StreamInputRequest_StartEvent{Process: selector(p.PID)},
		}}); err != nil {
			return err
		}
	}
	payload := &rpc.ProcessInput{Input: &rpc.ProcessInput_Stdin{Stdin: data}}
	if in.process.pty {
		payload.Input = &rpc.ProcessInput_Pty{Pty: data}
	}
	return in.sendEvent(&rpc.StreamInputRequest{Event: &rpc.StreamInputRequest_Data{
		Data: &rpc.StreamInputRequest_DataEvent{Input: payload},
	}})
}

func (in *Input) sendEvent(event *rpc.StreamInputRequest) error {
	err := in.stream.Send(event)
	if errors.Is(err, io.EOF) { // the server has ended the call; its reason is in the answer
		if _, answer := in.stream.CloseAndReceive(); answer != nil {
			err = answer
		}
	}
	if err != nil {
		return fmt.Errorf("write input: %w", err)
	}
	return nil
}

// Close waits until all that was written has been taken, and gives the process
// end of file: a closed stdin, or Ctrl-D on a terminal. That the process ends
// meanwhile, which it mostly does because of this, is no error.
func (in *Input) Close() error {
	err := in.close()
	if err != nil && in.process.ctx.Err() != nil {
		return nil
	}
	return err
}

func (in *Input) close() error {
	p := in.process
	if in.err == nil && p.pty {
		in.err = in.send([]byte{4})
	}
	if in.stream != nil && in.err == nil {
		if _, err := in.stream.CloseAndReceive(); err != nil {
			in.err = fmt.Errorf("write input: %w", err)
		}
	}
	if p.pty {
		return in.err
	}
	_, err := p.sandbox.processes.CloseStdin(p.sandbox.Context(p.ctx, ""), &rpc.CloseStdinRequest{Process: selector(p.PID)})
	if err != nil && in.err == nil {
		in.err = fmt.Errorf("close stdin: %w", err)
	}
	return in.err
}

// Result is what a finished program left behind.
type Result struct {
	Exit
	Stdout, Stderr []byte
}

// Run runs a program to its end and collects its output, without limit.
func (s *Sandbox) Run(ctx context.Context, c Command) (Result, error) {
	p, err := s.Start(ctx, c)
	if err != nil {
		return Result{}, err
	}
	var stdout, stderr bytes.Buffer
	exit, err := p.Wait(&stdout, &stderr)
	return Result{Exit: exit, Stdout: stdout.Bytes(), Stderr: stderr.Bytes()}, err
}
