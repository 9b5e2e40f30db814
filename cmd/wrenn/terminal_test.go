package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/client/clienttest"
)

// patience is how long a test waits for what must come.
const patience = 20 * time.Second

// wrennCommand is the program, told of the platform.
func wrennCommand(p *clienttest.Platform, dir string, args ...string) *exec.Cmd {
	cmd := exec.Command("wrenn", args...)
	cmd.Env = append(os.Environ(), "WRENN_DATA="+dir, "E2B_API_URL=", "E2B_API_KEY=", "E2B_DOMAIN=", "E2B_SANDBOX_URL=")
	return cmd
}

func newPlatformDir(t *testing.T) (*clienttest.Platform, string) {
	t.Helper()
	p, dir := clienttest.New(t), t.TempDir()
	err := client.Credentials{APIURL: p.URL, APIKey: clienttest.APIKey}.Save(filepath.Join(dir, client.CredentialsFile))
	if err != nil {
		t.Fatal(err)
	}
	return p, dir
}

func shellWord(t *testing.T, quoted string) string {
	t.Helper()
	out, err := exec.Command("sh", "-c", "printf %s "+quoted).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

// reader collects output and waits for texts in it.
type reader struct {
	t      *testing.T
	chunks chan []byte
	seen   bytes.Buffer
}

func newReader(t *testing.T, r io.Reader) *reader {
	out := &reader{t: t, chunks: make(chan []byte)}
	go func() {
		defer close(out.chunks)
		for {
			buf := make([]byte, 4096)
			n, err := r.Read(buf)
			if n > 0 {
				out.chunks <- buf[:n]
			}
			if err != nil {
				return
			}
		}
	}()
	return out
}

// await returns the submatches of pattern as soon as it has come, and forgets
// everything up to its end.
func (r *reader) await(pattern string) []string {
	r.t.Helper()
	expression, limit := regexp.MustCompile(pattern), time.After(patience)
	for {
		if at := expression.FindSubmatchIndex(r.seen.Bytes()); at != nil {
			match := expression.FindStringSubmatch(r.seen.String())
			r.seen.Next(at[1])
			return match
		}
		select {
		case chunk, more := <-r.chunks:
			if !more {
				r.t.Fatalf("output ended without %q: %q", pattern, r.seen.String())
			}
			r.seen.Write(chunk)
		case <-limit:
			r.t.Fatalf("no %q in output: %q", pattern, r.seen.String())
		}
	}
}

func exitCode(err error) int {
	var exit *exec.ExitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &exit) && exit.Exited():
		return exit.ExitCode()
	}
	return -1
}

// onTerminal starts the program on a terminal of 100 by 40. Master and slave are
// open until the test ends, so the terminal's state can be seen afterwards.
func onTerminal(t *testing.T, cmd *exec.Cmd) (master *os.File, out *reader) {
	t.Helper()
	master, slave, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close(); slave.Close() })
	pty.Setsize(master, &pty.Winsize{Cols: 100, Rows: 40})
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return master, newReader(t, master)
}

func termios(t *testing.T, f *os.File) unix.Termios {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return *state
}

func TestATerminalIsRawWhileTheCommandRunsAndRestoredAfterwards(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(p *clienttest.Platform, cmd *exec.Cmd, master *os.File)
		code int
	}{
		{"it exits", func(_ *clienttest.Platform, _ *exec.Cmd, master *os.File) { io.WriteString(master, "exit 3\r") }, 3},
		{"SIGHUP", func(_ *clienttest.Platform, cmd *exec.Cmd, _ *os.File) {
			cmd.Process.Signal(syscall.SIGHUP)
		}, 129},
		{"SIGQUIT", func(_ *clienttest.Platform, cmd *exec.Cmd, _ *os.File) { cmd.Process.Signal(syscall.SIGQUIT) }, 131},
		{"the sandbox ends", func(p *clienttest.Platform, _ *exec.Cmd, _ *os.File) { p.KillAll() }, 137},
	} {
		t.Run(test.name, func(t *testing.T) {
			p, dir := newPlatformDir(t)
			cmd := wrennCommand(p, dir, "run", "-it", "-e", "PS1=prompt# ", "--", "bash", "--norc")
			master, out := onTerminal(t, cmd)
			before := termios(t, master)
			out.await("prompt# ")
			if during := termios(t, master); during.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG) != 0 {
				t.Error("the terminal is not raw")
			}
			test.end(p, cmd, master)
			if code := exitCode(cmd.Wait()); code != test.code {
				t.Errorf("exit code %d, want %d", code, test.code)
			}
			if termios(t, master) != before {
				t.Error("the terminal is not what it was")
			}
			if left := p.Running(); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}

func TestATerminalHasTheRightSizeAlsoAfterAChange(t *testing.T) {
	p, dir := newPlatformDir(t)
	cmd := wrennCommand(p, dir, "run", "-it", "--", "bash", "-c", `trap 'stty size; exit' WINCH; echo $TERM; stty size; while :; do sleep 0.05; done`)
	cmd.Env = append(cmd.Env, "TERM=screen-256color")
	master, out := onTerminal(t, cmd)
	out.await("screen-256color\r\n40 100\r\n")
	if err := pty.Setsize(master, &pty.Winsize{Cols: 132, Rows: 50}); err != nil {
		t.Fatal(err)
	}
	out.await("50 132\r\n")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

func TestKeystrokesComeAllInOrderAndCtrlCIsOne(t *testing.T) {
	p, dir := newPlatformDir(t)
	cmd := wrennCommand(p, dir, "run", "-it", "--", "bash", "-c", `stty raw -echo; echo ready; head -c 5000 | md5sum; stty sane; trap 'echo interrupted; exit 4' INT; echo again; while :; do sleep 0.05; done`)
	master, out := onTerminal(t, cmd)
	out.await("ready")
	var typed strings.Builder
	for i := range 5000 {
		key := []byte{byte('a' + i*7%26)}
		typed.Write(key)
		if _, err := master.Write(key); err != nil {
			t.Fatal(err)
		}
	}
	want := shellWord(t, "$(printf %s "+typed.String()+" | md5sum)")
	if got := out.await("([0-9a-f]{32})")[1]; !strings.HasPrefix(want, got) {
		t.Errorf("keys have the sum %s, want %s", got, want)
	}
	out.await("again")
	io.WriteString(master, "\x03")
	out.await("interrupted")
	if code := exitCode(cmd.Wait()); code != 4 {
		t.Errorf("exit code %d, want 4", code)
	}
}

func TestWithoutITheTerminalIsNotRead(t *testing.T) {
	p, dir := newPlatformDir(t)
	cmd := wrennCommand(p, dir, "run", "--", "sh", "-c", "cat; echo done")
	master, out := onTerminal(t, cmd)
	before := termios(t, master)
	out.await("done")
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	if termios(t, master) != before {
		t.Error("the terminal was changed")
	}
}

func TestAShellOpensInASandboxThatStays(t *testing.T) {
	p, dir := newPlatformDir(t)
	info, err := p.Client().Create(t.Context(), client.CreateRequest{TemplateID: "base"})
	if err != nil {
		t.Fatal(err)
	}
	cmd := wrennCommand(p, dir, "sandbox", "shell", info.SandboxID)
	master, out := onTerminal(t, cmd)
	io.WriteString(master, "echo sum $((40+2)); exit 6\r")
	out.await("sum 42")
	if code := exitCode(cmd.Wait()); code != 6 {
		t.Errorf("exit code %d, want 6", code)
	}
	if got := p.Running(); len(got) != 1 {
		t.Errorf("running: %v", got)
	}
}
