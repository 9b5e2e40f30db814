package gvisor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
)

// exec runs one runsc command to its end, in the directory of its log. The error says
// what runsc wrote to that. runsc's own input and output are the null device, because
// they become the guest's.
func (r *Runtime) exec(ctx context.Context, log string, args []string) error {
	// The kernel ties Pdeathsig to the thread that started the process, so that
	// thread must stay. With it a kill of the agent takes along a runsc that is
	// half-way, and nothing appears after the next start has cleaned up.
	goruntime.LockOSThread()
	defer goruntime.UnlockOSThread()

	cmd := exec.CommandContext(ctx, r.cfg.Binary, args...)
	cmd.Dir = filepath.Dir(log)
	cmd.Env = []string{} // nothing of the agent's environment; never nil
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	var exit *exec.ExitError
	if reason := fatalError(log); errors.As(err, &exit) && reason != "" {
		return fmt.Errorf("runsc: %s", reason)
	}
	return fmt.Errorf("run runsc: %w", err)
}

// fatalError is the last error in a log of runsc's, or "".
func fatalError(log string) string {
	f, err := os.Open(log)
	if err != nil {
		return ""
	}
	defer f.Close()
	var last string
	// It is a sequence of objects, with or without line ends between them.
	for d := json.NewDecoder(io.LimitReader(f, 1<<20)); ; {
		var entry struct {
			Msg string `json:"msg"`
		}
		if d.Decode(&entry) != nil {
			return last
		}
		last = shorten(entry.Msg)
	}
}

// shorten makes one line of reasonable length of a message: runsc prints whole
// structures into some. The cause is at the end.
func shorten(msg string) string {
	const most = 200
	msg = strings.Join(strings.Fields(msg), " ")
	if len(msg) > 2*most {
		msg = strings.ToValidUTF8(msg[:most]+" … "+msg[len(msg)-most:], "")
	}
	return msg
}

// crash is the first line of what the sandbox kernel wrote when it crashed, or "".
func crash(log string) string {
	f, err := os.Open(log)
	if err != nil {
		return ""
	}
	defer f.Close()
	head := make([]byte, 64<<10)
	n, _ := io.ReadFull(f, head)
	for line := range bytes.Lines(head[:n]) {
		if line := strings.TrimSpace(string(line)); strings.HasPrefix(line, "panic:") || strings.HasPrefix(line, "fatal error:") {
			return line
		}
	}
	return ""
}
