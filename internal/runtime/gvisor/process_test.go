package gvisor

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestAProcessIsHeldWatchedAndItsExitTold(t *testing.T) {
	for name, test := range map[string]struct {
		script string
		kill   bool
		want   unix.WaitStatus
	}{
		"by its status": {"exit 7", false, 7 << 8},
		"by its signal": {"exec sleep 60", true, 9},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := exec.Command("sh", "-c", "read line; "+test.script)
			in, err := cmd.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer cmd.Process.Release()
			p, err := identify(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			h, err := p.open()
			if err != nil {
				t.Fatal(err)
			}
			defer h.close()
			if h.ended() {
				t.Fatal("ended while it waits for input")
			}
			if test.kill {
				if err := h.kill(); err != nil {
					t.Fatal(err)
				}
			} else {
				in.Write([]byte("go\n"))
			}
			h.pidfd.SetReadDeadline(time.Now().Add(10 * time.Second))
			if err := h.wait(); err != nil {
				t.Fatal(err)
			}
			if _, err := p.open(); !errors.Is(err, os.ErrProcessDone) {
				t.Errorf("an ended process can be opened: %v", err)
			}
			if ws, known := h.exitStatus(); !known || ws != test.want {
				t.Errorf("exit status %#x, %v; want %#x", ws, known, test.want)
			}
			// Now it is reaped; the status is asked for once more, as for a
			// process that is no child of ours.
			if ws, known := h.exitStatus(); known && ws != test.want {
				t.Errorf("exit status after the reaping %#x; want %#x", ws, test.want)
			}
			if err := h.kill(); err != nil {
				t.Error("killing what has ended:", err)
			}
		})
	}
}

func TestAnotherProcessWithThePidIsNotTaken(t *testing.T) {
	p, err := identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	p.Start-- // as if the pid had had an owner before
	if h, err := p.open(); !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("opened %+v, %v", h, err)
	}
	if _, err := (process{}).open(); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("opening no process gives %v", err)
	}
}

func TestAnEndingIsToldInWords(t *testing.T) {
	for _, test := range []struct {
		name, panic, log string
		status           unix.WaitStatus
		known            bool
		want             string
	}{
		{name: "status of init", status: 3 << 8, known: true, want: "guest agent exited with status 3"},
		{name: "signal to init", status: (128 + 11) << 8, known: true, want: "guest agent was killed (signal 11)"},
		{name: "signal to the engine", status: 9, known: true, want: "sandbox engine was killed (signal 9)"},
		{name: "nothing known", want: "sandbox engine ended"},
		{name: "crash", panic: "goroutine trace\npanic: watchdog\nmore\n", status: 2 << 8, known: true, want: "sandbox engine crashed: panic: watchdog"},
		{name: "log, nothing else", log: `{"msg":"first"}{"msg":"disk\n gone"}`, want: "sandbox engine failed: disk gone"},
		{name: "broken log", log: `{"msg":`, want: "sandbox engine ended"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, content := range map[string]string{panicFile: test.panic, logFile: test.log} {
				if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if got := ending(dir, test.status, test.known); got != test.want {
				t.Errorf("got %q, want %q", got, test.want)
			}
		})
	}
}
