package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime/life"
)

// Methods of the engine. It serves them to runsc on a socket, as one JSON object
// for a request and one for its answer; files go with a request's first byte.
// Calling them takes a hundredth of the time that runsc needs to start.
const (
	methodCheckpoint = "containerManager.Checkpoint"
	methodPause      = "containerManager.Pause"
	methodResume     = "containerManager.Resume"
	methodSaveFiles  = "containerManager.FSSave"
	methodStacks     = "debug.Stacks"
)

// call asks the engine for something and waits for the answer, which goes into
// result unless that is nil. When ctx ends it returns, but the engine goes on
// with what it was asked for.
func (i *instance) call(ctx context.Context, method string, arg any, result any, files ...*os.File) (err error) {
	defer func() {
		switch {
		case err == nil:
		case i.Engine.Ended(), brokenOff(err):
			err = life.Gone(i.ID)
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		}
	}()
	conn, err := i.dial()
	if err != nil {
		return fmt.Errorf("connect to sandbox engine: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()

	request, err := json.Marshal(struct {
		Method string `json:"method"`
		Arg    any    `json:"arg"`
	}{method, arg})
	if err != nil {
		return err
	}
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for n, f := range files {
			fds[n] = int(f.Fd())
		}
		rights = unix.UnixRights(fds...)
	}
	n, _, err := conn.WriteMsgUnix(request, rights, nil)
	if err == nil && n < len(request) {
		_, err = conn.Write(request[n:])
	}
	if err != nil {
		return fmt.Errorf("ask sandbox engine: %w", err)
	}
	answer := struct {
		Success bool            `json:"success"`
		Err     string          `json:"err"`
		Result  json.RawMessage `json:"result"`
	}{}
	if err := json.NewDecoder(conn).Decode(&answer); err != nil {
		return fmt.Errorf("wait for sandbox engine: %w", err)
	}
	if !answer.Success {
		return errors.New("sandbox engine: " + shorten(answer.Err))
	}
	if result == nil {
		return nil
	}
	return json.Unmarshal(answer.Result, result)
}

// brokenOff reports whether nobody is at the other end any more. The engine closes
// no connection while it lives.
func brokenOff(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) ||
		errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EPIPE)
}

// dial connects to the engine's socket.
func (i *instance) dial() (*net.UnixConn, error) {
	rs, err := readRunscState(i.rt.cfg.Root, i.ID)
	if err != nil {
		return nil, err
	}
	// The path may be too long for a socket's name.
	path, err := os.OpenFile(rs.Sandbox.ControlSocketPath, unix.O_PATH, 0)
	if err != nil {
		return nil, err
	}
	defer path.Close()
	return net.DialUnix("unix", nil, &net.UnixAddr{Name: fmt.Sprintf("/proc/self/fd/%d", path.Fd()), Net: "unix"})
}
