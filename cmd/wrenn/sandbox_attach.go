package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync/atomic"
	"syscall"
	"time"

	rpc "connectrpc.com/connect"

	"github.com/wrenn/wrenn/internal/client"
)

// signalTimeout bounds how long passing a signal on may take.
const signalTimeout = 10 * time.Second

// interrupted ends an attachment because of a signal to this program.
type interrupted struct{ signal syscall.Signal }

func (i interrupted) Error() string { return "interrupted: " + i.signal.String() }

// exit is the exit status of a program that the signal ended.
func (i interrupted) exit() *exitError { return &exitError{code: 128 + int(i.signal)} }

// watchSignals collects the signals that would end this program, so that it can
// clean up. A broken pipe becomes an error of the write.
func watchSignals() (signals <-chan os.Signal, stop func()) {
	c := make(chan os.Signal, 4)
	signal.Ignore(syscall.SIGPIPE)
	signal.Notify(c, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	return c, func() { signal.Stop(c) }
}

// attachment connects this program's standard streams, terminal and signals with
// a command in a sandbox.
type attachment struct {
	command     client.Command
	interactive bool
	tty         bool
	signals     <-chan os.Signal

	process atomic.Pointer[client.Process]
	first   atomic.Int32 // the signal that was passed on, or 0
}

// run starts the command and stays with it to its end. The returned exit is the
// command's. After an error other than an exitError the command may be running
// still.
func (a *attachment) run(ctx context.Context, s *client.Sandbox) (client.Exit, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go a.forwardSignals(ctx, cancel)

	input := os.Stdin
	if a.tty {
		t, err := openTerminal(os.Stdin, os.Stdout, a.interactive)
		if err != nil {
			return client.Exit{}, err
		}
		defer t.restore()
		a.command.Size = t.size()
		a.command.Env = terminalEnv(a.command.Env)
		input = t.in
		if err := a.start(ctx, s); err != nil {
			return client.Exit{}, err
		}
		go t.follow(ctx, a.process.Load(), *a.command.Size)
	} else {
		a.command.Stdin = passesStdin(os.Stdin, a.interactive)
		if !a.command.Stdin {
			input = nil
		}
		if err := a.start(ctx, s); err != nil {
			return client.Exit{}, err
		}
	}
	if input != nil {
		// A read of stdin cannot be called off: this ends with the program at the latest.
		go a.pump(input, cancel)
	}
	exit, err := a.process.Load().Wait(os.Stdout, os.Stderr)
	if err != nil {
		return exit, endOf(ctx, err)
	}
	if first := syscall.Signal(a.first.Load()); first != 0 && exit.Signal == syscall.SIGTERM {
		exit.Signal = first // it ended as asked: by Ctrl-C, which went over as SIGTERM
	}
	return exit, nil
}

func (a *attachment) start(ctx context.Context, s *client.Sandbox) error {
	p, err := s.Start(ctx, a.command)
	var failed *client.StartError
	switch {
	case errors.As(err, &failed):
		code := exitPlatform
		if failed.NotFound {
			code = exitNotFound
		} else if failed.NotExecutable {
			code = exitNotExecutable
		}
		return &exitError{code, err}
	case err != nil:
		return endOf(ctx, err)
	}
	a.process.Store(p)
	return nil
}

// endOf returns why ctx was ended, if it was: then err is only a consequence.
func endOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// forwardSignals passes the first SIGINT or SIGTERM on to the process and ends the
// attachment at the second, or at once when nobody is there to ask any more.
func (a *attachment) forwardSignals(ctx context.Context, end context.CancelCauseFunc) {
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-a.signals:
			sig := s.(syscall.Signal)
			p := a.process.Load()
			polite := sig == syscall.SIGINT || sig == syscall.SIGTERM
			if p == nil || !polite || !a.first.CompareAndSwap(0, int32(sig)) {
				end(interrupted{sig})
				return
			}
			go func() {
				ctx, cancel := context.WithTimeout(ctx, signalTimeout)
				defer cancel()
				// The guest agent knows SIGTERM and SIGKILL only.
				_ = p.Signal(ctx, syscall.SIGTERM) // fails when the process has just ended
			}()
		}
	}
}

// pump sends what comes from in to the process, then end of file. A process that
// does not want it is no error; a lost connection ends the attachment.
func (a *attachment) pump(in io.Reader, end context.CancelCauseFunc) {
	to := a.process.Load().Input()
	// Struct literals hide ReadFrom and WriteTo, so that the buffer's size counts.
	_, err := io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{in}, make([]byte, 64<<10))
	if err == nil {
		err = to.Close()
	}
	if rpc.CodeOf(err) == rpc.CodeUnavailable {
		end(fmt.Errorf("send input: %w", err))
	}
}

// exitStatus turns the outcome of an attachment into what the program exits with.
func exitStatus(exit client.Exit, err error) error {
	var output *client.OutputError
	var interrupt interrupted
	var already *exitError
	switch {
	case err == nil && exit.Status() == 0:
		return nil
	case err == nil:
		return &exitError{code: exit.Status()}
	case errors.As(err, &interrupt):
		return interrupt.exit()
	case errors.As(err, &output) && errors.Is(err, syscall.EPIPE):
		return &exitError{code: 128 + int(syscall.SIGPIPE)} // whoever read the output has had enough
	case errors.As(err, &already):
		return already
	}
	return &exitError{exitPlatform, err}
}
