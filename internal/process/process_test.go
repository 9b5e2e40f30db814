package process

import (
	"context"
	"errors"
	"os"
	"os/exec"
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
			p, err := Identify(cmd.Process.Pid)
			if err != nil {
				t.Fatal(err)
			}
			h, err := p.Open()
			if err != nil {
				t.Fatal(err)
			}
			defer h.Close()
			if h.Ended() {
				t.Fatal("ended while it waits for input")
			}
			if test.kill {
				if err := h.Kill(); err != nil {
					t.Fatal(err)
				}
			} else {
				in.Write([]byte("go\n"))
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if err := h.Wait(ctx); err != nil {
				t.Fatal(err)
			}
			if _, err := p.Open(); !errors.Is(err, os.ErrProcessDone) {
				t.Errorf("an ended process can be opened: %v", err)
			}
			if ws, known := h.ExitStatus(); !known || ws != test.want {
				t.Errorf("exit status %#x, %v; want %#x", ws, known, test.want)
			}
			// Now it is reaped; the status is asked for once more, as for a
			// process that is no child of ours.
			if ws, known := h.ExitStatus(); known && ws != test.want {
				t.Errorf("exit status after the reaping %#x; want %#x", ws, test.want)
			}
			if err := h.Kill(); err != nil {
				t.Error("killing what has ended:", err)
			}
		})
	}
}

func TestAnotherProcessWithThePidIsNotTaken(t *testing.T) {
	p, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	p.Start-- // as if the pid had had an owner before
	if h, err := p.Open(); !errors.Is(err, os.ErrProcessDone) {
		t.Fatalf("opened %+v, %v", h, err)
	}
	if _, err := (ID{}).Open(); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("opening no process gives %v", err)
	}
}

func TestEndTakesChildrenOffTheTable(t *testing.T) {
	for what, args := range map[string][]string{"runs": {"sleep", "60"}, "has ended": {"true"}} {
		cmd := exec.Command(args[0], args[1:]...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		id, err := Identify(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if what == "has ended" {
			var info unix.Siginfo
			if err := unix.Waitid(unix.P_PID, id.PID, &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
				t.Fatal(err)
			}
		}
		if err := id.End(t.Context()); err != nil {
			t.Errorf("one that %s: %v", what, err)
		}
		if err := unix.Kill(id.PID, 0); !errors.Is(err, unix.ESRCH) {
			t.Errorf("one that %s is still there (%v)", what, err)
		}
	}
	if err := (ID{}).End(t.Context()); err != nil {
		t.Errorf("none: %v", err)
	}
}

// TestNoFiles opens a process that runs where this one may open one more file only. It is
// not said to have ended.
func TestNoFiles(t *testing.T) {
	c := exec.CommandContext(t.Context(), "sleep", "60")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	id, err := Identify(c.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	free, err := unix.Dup(1) // the lowest that is free
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(free)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free) + 1, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	h, err := id.Open()
	if back := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); back != nil {
		t.Fatal(back)
	}
	if err == nil {
		h.Close()
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Errorf("a process that runs: %v, want it not to be said to have ended", err)
	}
}

// TestAnotherBoot opens a process that was noted before the host booted: it is another
// one, though number and time are the same.
func TestAnotherBoot(t *testing.T) {
	id, err := Identify(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for boot, want := range map[string]error{id.Boot: nil, "": nil, "another": os.ErrProcessDone} {
		noted := id
		noted.Boot = boot
		h, err := noted.Open()
		if !errors.Is(err, want) {
			t.Errorf("noted in boot %q: %v, want %v", boot, err, want)
		}
		if err == nil {
			h.Close()
		}
	}
}
