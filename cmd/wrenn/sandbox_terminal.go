package main

import (
	"cmp"
	"context"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/wrenn/wrenn/internal/client"
)

// terminal is the caller's terminal while a program in a sandbox has it.
type terminal struct {
	in     *os.File // keystrokes; nil when they are not passed on
	sized  *os.File // whose size counts
	before *term.State
	resize chan os.Signal
}

// openTerminal takes the terminal over: keystrokes go through as they are, and
// resizes are noticed. restore gives it back and must be called.
func openTerminal(in, out *os.File, interactive bool) (*terminal, error) {
	t := &terminal{sized: out, resize: make(chan os.Signal, 1)}
	if term.IsTerminal(int(in.Fd())) {
		t.sized = in
	}
	if interactive {
		if t.sized != in {
			return nil, usageErrorf("-i and -t together need a terminal on standard input: leave out -t")
		}
		before, err := term.MakeRaw(int(in.Fd()))
		if err != nil {
			return nil, err
		}
		t.in, t.before = in, before
	}
	signal.Notify(t.resize, unix.SIGWINCH)
	return t, nil
}

// restore may be called twice.
func (t *terminal) restore() {
	signal.Stop(t.resize)
	if t.before != nil {
		_ = term.Restore(int(t.in.Fd()), t.before)
		t.before = nil
	}
}

// size returns the terminal's size, 80 by 24 when there is none.
func (t *terminal) size() *client.Size {
	cols, rows, err := term.GetSize(int(t.sized.Fd()))
	if err != nil || cols <= 0 || rows <= 0 {
		cols, rows = 80, 24
	}
	return &client.Size{Cols: uint32(cols), Rows: uint32(rows)}
}

// follow passes resizes on until ctx ends. Resizes that come while one is under
// way count as one: only the last size matters.
func (t *terminal) follow(ctx context.Context, p *client.Process, last client.Size) {
	// The size may have changed while the process was being started.
	if now := *t.size(); now != last {
		_ = p.Resize(ctx, now)
	}
	for {
		select {
		case <-t.resize:
			_ = p.Resize(ctx, *t.size()) // fails only when the process is gone
		case <-ctx.Done():
			return
		}
	}
}

// terminalEnv is what programs on a terminal want to know about it; the caller's
// own choices win.
func terminalEnv(chosen map[string]string) map[string]string {
	env := map[string]string{"TERM": cmp.Or(os.Getenv("TERM"), "xterm-256color"), "LANG": "C.UTF-8"}
	for name, value := range chosen {
		env[name] = value
	}
	return env
}

// passesStdin reports whether standard input is to be sent to the program: not a
// terminal's unless asked for, and not /dev/null, which the program has anyway.
func passesStdin(in *os.File, interactive bool) bool {
	info, err := in.Stat()
	if err != nil {
		return false // closed
	}
	if interactive {
		return true
	}
	if stat, ok := info.Sys().(*syscall.Stat_t); ok && info.Mode()&os.ModeCharDevice != 0 {
		if unix.Major(uint64(stat.Rdev)) == 1 && unix.Minor(uint64(stat.Rdev)) == 3 {
			return false
		}
	}
	return !term.IsTerminal(int(in.Fd()))
}
