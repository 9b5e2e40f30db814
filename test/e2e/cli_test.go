package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/creack/pty"
)

// wrenn runs the program under test; it must succeed.
func (p *platform) wrenn(args ...string) string {
	p.t.Helper()
	r := p.tryWrenn("", args...)
	if r.err != nil || r.exit != 0 {
		p.t.Fatalf("wrenn %s\n%s", strings.Join(args, " "), r)
	}
	return r.stdout
}

// tryWrenn runs the program under test with stdin.
func (p *platform) tryWrenn(stdin string, args ...string) result {
	p.t.Helper()
	cmd := p.command(args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	timer := time.AfterFunc(90*time.Second, func() { cmd.Process.Kill() })
	defer timer.Stop()
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		err = nil
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode(), err}
}

func (p *platform) command(args ...string) *exec.Cmd {
	cmd := exec.Command(suite.bin, args...)
	cmd.Env = p.environ("WRENN_DATA=" + p.dir)
	return cmd
}

func TestCommandLine(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)

	t.Run("run streams, takes input and passes the exit code back", func(t *testing.T) {
		p := p.with(t)
		for _, c := range []struct {
			name, stdin string
			args        []string
			want        result
		}{
			{"prints", "", []string{"run", "--", "python3", "-c", "print(6*7)"}, result{stdout: "42\n"}},
			{"fails", "", []string{"run", "--", "sh", "-c", "echo out; echo err >&2; exit 7"}, result{"out\n", "err\n", 7, nil}},
			{"reads", "hello\nworld\n", []string{"run", "--", "tr", "a-z", "A-Z"}, result{stdout: "HELLO\nWORLD\n"}},
			{"has variables", "", []string{"run", "-e", "A=1", "-e", "B=two words", "--", "sh", "-c", `echo "$A $B"`}, result{stdout: "1 two words\n"}},
			{"is the default user", "", []string{"run", "--", "id", "-un"}, result{stdout: "user\n"}},
			{"dies of a signal", "", []string{"run", "--", "sh", "-c", "kill -TERM $$"}, result{exit: 128 + 15}},
		} {
			if got := p.tryWrenn(c.stdin, c.args...); got != c.want {
				t.Errorf("%s: got %s\nwant %s", c.name, got, c.want)
			}
		}
		if r := p.tryWrenn("", "run", "--timeout", "2s", "--", "sleep", "100"); r.exit != 124 {
			t.Errorf("time limit: %s", r)
		}
		if r := p.tryWrenn("", "run", "--", "no-such-program"); r.exit != 127 || r.stderr == "" {
			t.Errorf("unknown command: %s", r)
		}
		if ids := p.running(); len(ids) > 0 {
			t.Errorf("left running: %v", ids)
		}
	})

	t.Run("run passes a megabyte through", func(t *testing.T) {
		p := p.with(t)
		data := strings.Repeat("0123456789abcdef", 1<<16)
		if r := p.tryWrenn(data, "run", "--", "cat"); r.stdout != data || r.exit != 0 {
			t.Errorf("%d bytes came back, exit %d, %v %s", len(r.stdout), r.exit, r.err, r.stderr)
		}
	})

	t.Run("run ends its sandbox when it is interrupted", func(t *testing.T) {
		p := p.with(t)
		cmd := p.command("run", "--", "sh", "-c", "echo ready; exec sleep 1000")
		var out lockedBuffer
		cmd.Stdout = &out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Process.Kill() // when the test has failed
		eventually(t, 20*time.Second, "the command runs", func() error {
			if out.String() != "ready\n" {
				return errors.New(out.String())
			}
			return nil
		})
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if code := cmd.ProcessState.ExitCode(); code == 0 {
			t.Error("exit code 0 after SIGTERM")
		}
		if ids := p.running(); len(ids) > 0 {
			t.Errorf("left running: %v", ids)
		}
	})

	t.Run("run -it gives a terminal", func(t *testing.T) {
		p := p.with(t)
		cmd := p.command("run", "-it", "--", "bash", "--norc")
		tty, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 33, Cols: 99})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { cmd.Process.Kill(); tty.Close() }() // when the test has failed
		var screen lockedBuffer
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			buf := make([]byte, 4096)
			for {
				n, err := tty.Read(buf)
				screen.Write(buf[:n])
				if err != nil {
					return
				}
			}
		}()
		sees := func(text string) {
			t.Helper()
			eventually(t, 20*time.Second, "terminal shows "+text, func() error {
				if !strings.Contains(screen.String(), text) {
					return errors.New(screen.String())
				}
				return nil
			})
		}
		sees("$")
		tty.WriteString("echo size=$(stty size) tty=$(tty)\n")
		sees("size=33 99 tty=/dev/pts/")
		if err := pty.Setsize(tty, &pty.Winsize{Rows: 20, Cols: 70}); err != nil {
			t.Fatal(err)
		}
		eventually(t, 10*time.Second, "new size arrives", func() error {
			tty.WriteString("echo now=$(stty size)\n")
			if !strings.Contains(screen.String(), "now=20 70") {
				return errors.New(screen.String())
			}
			return nil
		})
		tty.WriteString("sh -c 'echo asleep-$((1+1)); exec sleep 1000'\n")
		sees("asleep-2")
		tty.WriteString("\x03")
		tty.WriteString("echo awake-$((1+1))\n")
		sees("awake-2")
		tty.WriteString("exit 5\n")
		timer := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
		cmd.Wait()
		timer.Stop()
		<-drained
		if code := cmd.ProcessState.ExitCode(); code != 5 {
			t.Errorf("exit code %d, want 5\n%s", code, screen.String())
		}
	})

	t.Run("sandbox create, ls, info, exec, cp and kill", func(t *testing.T) {
		p := p.with(t)
		id := strings.TrimSpace(p.wrenn("sandbox", "create", "--metadata", "who=cli", "-e", "SET=here"))
		var list []struct {
			SandboxID string `json:"sandboxID"`
		}
		if err := json.Unmarshal([]byte(p.wrenn("sandbox", "ls", "--json", "--metadata", "who=cli")), &list); err != nil {
			t.Fatal(err)
		}
		if len(list) != 1 || list[0].SandboxID != id {
			t.Errorf("listed: %v, want %s", list, id)
		}
		if out := p.wrenn("sandbox", "info", id); !strings.Contains(out, id) {
			t.Errorf("info: %s", out)
		}
		if r := p.tryWrenn("in", "sandbox", "exec", id, "--", "sh", "-c", `echo "$SET $(cat)"; exit 9`); r != (result{"here in\n", "", 9, nil}) {
			t.Errorf("exec: %s", r)
		}
		dir := t.TempDir()
		if err := errors.Join(os.MkdirAll(filepath.Join(dir, "tree/deep"), 0o755), os.WriteFile(filepath.Join(dir, "tree/deep/ü.txt"), []byte("content"), 0o644)); err != nil {
			t.Fatal(err)
		}
		p.wrenn("sandbox", "cp", filepath.Join(dir, "tree"), id+":/home/user/tree")
		if out := p.wrenn("sandbox", "exec", id, "--", "cat", "/home/user/tree/deep/ü.txt"); out != "content" {
			t.Errorf("copied in: %q", out)
		}
		p.wrenn("sandbox", "cp", id+":/home/user/tree/deep/ü.txt", filepath.Join(dir, "back"))
		if got, err := os.ReadFile(filepath.Join(dir, "back")); err != nil || string(got) != "content" {
			t.Errorf("copied out: %q, %v", got, err)
		}
		p.wrenn("sandbox", "kill", id)
		if r := p.tryWrenn("", "sandbox", "info", id); r.exit == 0 || !strings.Contains(r.stderr, id) {
			t.Errorf("info of a killed sandbox: %s", r)
		}
	})

	t.Run("what is wrong is said", func(t *testing.T) {
		p := p.with(t)
		for _, args := range [][]string{{"run"}, {"run", "--no-such-flag"}, {"sandbox", "exec"}, {"no-such-command"}, {"up", "--listen", "nonsense"}} {
			if r := p.tryWrenn("", args...); r.exit != 2 || !strings.Contains(r.stderr, "--help") {
				t.Errorf("wrenn %v: %s", args, r)
			}
		}
		if r := p.tryWrenn("", "up", "--data", p.dir, "--listen", "localhost:0"); r.exit == 0 || !strings.Contains(r.stderr, "running") {
			t.Errorf("a second platform on the same data directory: %s", r)
		}
		if out := p.wrenn("version"); strings.TrimSpace(out) == "" {
			t.Error("no version")
		}
	})

	t.Run("env names the platform", func(t *testing.T) {
		p := p.with(t)
		cmd := exec.Command("bash", "-c", `eval "$("$0" env --data "$1")" && echo "$E2B_API_URL $E2B_SANDBOX_URL $E2B_API_KEY"`, suite.bin, p.dir)
		out, err := cmd.CombinedOutput()
		if want := p.url + " " + p.url + " " + p.key + "\n"; err != nil || string(out) != want {
			t.Errorf("got %q, %v; want %q", out, err, want)
		}
	})
}

// TestE2BCommandLine runs E2B's own command line.
func TestE2BCommandLine(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	dir, node := installJS(t)
	e2b := func(args ...string) (string, error) {
		cmd := exec.Command(node, append([]string{filepath.Join(dir, "node_modules/@e2b/cli/dist/index.js")}, args...)...)
		cmd.Env = p.environ("HOME=" + t.TempDir())
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	b := p.create(map[string]any{"metadata": map[string]string{"who": "e2b-cli"}})
	if out, err := e2b("sandbox", "list", "--format", "json"); err != nil || !strings.Contains(out, b.id) {
		t.Errorf("sandbox list: %v\n%s", err, out)
	}
	if out, err := e2b("sandbox", "exec", b.id, "echo", "from", "e2b"); err != nil || !strings.Contains(out, "from e2b") {
		t.Errorf("sandbox exec: %v\n%s", err, out)
	}
	if out, err := e2b("sandbox", "logs", b.id); err != nil {
		t.Errorf("sandbox logs: %v\n%s", err, out)
	}
	if out, err := e2b("sandbox", "kill", b.id); err != nil {
		t.Errorf("sandbox kill: %v\n%s", err, out)
	}
	b.gone(t, time.Second)
}
