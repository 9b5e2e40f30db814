package client_test

import (
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/client/clienttest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func open(t *testing.T) *client.Sandbox {
	t.Helper()
	c, info := create(t, clienttest.New(t), nil)
	return c.Sandbox(info)
}

func sh(script string) client.Command {
	return client.Command{Path: "sh", Args: []string{"-c", script}}
}

func TestRunReturnsOutputAndHowItEnded(t *testing.T) {
	s := open(t)
	tests := []struct {
		name           string
		command        client.Command
		stdout, stderr string
		exit           client.Exit
		status         int
	}{
		{"success", sh("echo out; echo err >&2"), "out\n", "err\n", client.Exit{}, 0},
		{"an exit code", sh("exit 7"), "", "", client.Exit{Code: 7}, 7},
		{"a signal", sh("kill -TERM $$"), "", "", client.Exit{Code: -1, Signal: syscall.SIGTERM}, 143},
		{"a crash, perhaps with core dumped", sh("kill -SEGV $$"), "", "", client.Exit{Code: -1, Signal: syscall.SIGSEGV}, 139},
		{"arguments as given", client.Command{Path: "printf", Args: []string{"%s|", "a b", "", "$HOME", "*"}}, "a b||$HOME|*|", "", client.Exit{}, 0},
		{"environment and directory", client.Command{Path: "sh", Args: []string{"-c", "echo $X; pwd"}, Env: map[string]string{"X": "y z"}, Dir: "/usr"}, "y z\n/usr\n", "", client.Exit{}, 0},
		{"no stdin", client.Command{Path: "cat"}, "", "", client.Exit{}, 0},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			got, err := s.Run(t.Context(), test.command)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff([]any{test.stdout, test.stderr, test.exit, test.status}, []any{string(got.Stdout), string(got.Stderr), got.Exit, got.Status()}); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestStartErrorsTellWhatAShellTells(t *testing.T) {
	s := open(t)
	plain := filepath.Join(t.TempDir(), "plain")
	os.WriteFile(plain, []byte("x"), 0o644)
	tests := []struct {
		name                    string
		command                 client.Command
		notFound, notExecutable bool
	}{
		{"not in PATH", client.Command{Path: "no-such-program"}, true, false},
		{"no such file", client.Command{Path: "/no/such/program"}, true, false},
		{"below a file", client.Command{Path: plain + "/x"}, true, false},
		{"not executable", client.Command{Path: plain}, false, true},
		{"a directory", client.Command{Path: "/usr"}, false, true},
		{"directory missing", client.Command{Path: "true", Dir: "/no/such/directory"}, false, false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := s.Start(t.Context(), test.command)
			var failed *client.StartError
			if !errors.As(err, &failed) || failed.NotFound != test.notFound || failed.NotExecutable != test.notExecutable {
				t.Errorf("error %#v", err)
			}
		})
	}
}

func TestInputComesWholeInOrderAndEnds(t *testing.T) {
	s := open(t)
	data := make([]byte, 8<<20)
	rand.Read(data)
	p, err := s.Start(t.Context(), client.Command{Path: "cat", Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		in := p.Input()
		_, err := io.Copy(struct{ io.Writer }{in}, bytes.NewReader(data))
		sent <- errors.Join(err, in.Close())
	}()
	var out bytes.Buffer
	exit, err := p.Wait(&out, io.Discard)
	if err := errors.Join(err, <-sent); err != nil || exit.Status() != 0 {
		t.Fatalf("exit %d, %v", exit.Status(), err)
	}
	if !bytes.Equal(out.Bytes(), data) {
		t.Errorf("%d bytes came back of %d, or others", out.Len(), len(data))
	}
}

func TestInputWithoutBytesIsEndOfFile(t *testing.T) {
	s := open(t)
	p, err := s.Start(t.Context(), client.Command{Path: "cat", Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Input().Close(); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(io.Discard, io.Discard); err != nil || exit.Status() != 0 {
		t.Errorf("exit %d, %v", exit.Status(), err)
	}
}

func TestAProcessThatReadsNothingDoesNotHoldItsInputUp(t *testing.T) {
	s := open(t)
	p, err := s.Start(t.Context(), client.Command{Path: "sh", Args: []string{"-c", "read line; echo $line"}, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		in := p.Input()
		in.Write([]byte("first\n"))
		_, err := in.Write(make([]byte, 64<<20)) // far more than all buffers on the way
		done <- err
	}()
	var out bytes.Buffer
	if _, err := p.Wait(&out, io.Discard); err != nil || out.String() != "first\n" {
		t.Errorf("output %q, %v", out.String(), err)
	}
	if err := <-done; err == nil {
		t.Error("writing to a process that has ended is no error")
	}
}

func TestATerminalHasASizeAndTakesKeys(t *testing.T) {
	s := open(t)
	script := `trap 'stty size; exit 3' WINCH; stty size; read line; echo "got $line"; echo ready; while :; do sleep 0.1; done`
	p, err := s.Start(t.Context(), client.Command{Path: "bash", Args: []string{"-c", script}, Size: &client.Size{Cols: 100, Rows: 40}})
	if err != nil {
		t.Fatal(err)
	}
	in := p.Input()
	if _, err := in.Write([]byte("keys\r")); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	resized := false
	exit, err := p.Wait(writerFunc(func(b []byte) (int, error) {
		out.Write(b)
		if !resized && strings.Contains(out.String(), "ready") {
			resized = true
			if err := p.Resize(t.Context(), client.Size{Cols: 120, Rows: 50}); err != nil {
				t.Error(err)
			}
		}
		return len(b), nil
	}), io.Discard)
	if err != nil || exit.Code != 3 {
		t.Errorf("exit %+v, %v", exit, err)
	}
	for _, want := range []string{"40 100", "got keys", "50 120"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("output %q lacks %q", out.String(), want)
		}
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func TestAttachAndSignalReachARunningProcess(t *testing.T) {
	s := open(t)
	p, err := s.Start(t.Context(), client.Command{Path: "sleep", Args: []string{"100"}})
	if err != nil {
		t.Fatal(err)
	}
	p.Close() // the process outlives its first stream
	again, err := s.Attach(t.Context(), p.PID, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Signal(t.Context(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if exit, err := again.Wait(io.Discard, io.Discard); err != nil || exit.Signal != syscall.SIGKILL {
		t.Errorf("exit %+v, %v", exit, err)
	}
	if _, err := s.Attach(t.Context(), 999999999, false); err == nil {
		t.Error("attached to nothing")
	}
}

func TestAWriterThatFailsIsToldFromABrokenStream(t *testing.T) {
	p := clienttest.New(t)
	c, info := create(t, p, nil)
	s := c.Sandbox(info)
	yes, err := s.Start(t.Context(), client.Command{Path: "yes"})
	if err != nil {
		t.Fatal(err)
	}
	_, err = yes.Wait(writerFunc(func([]byte) (int, error) { return 0, syscall.EPIPE }), io.Discard)
	if !errors.As(err, new(*client.OutputError)) || !errors.Is(err, syscall.EPIPE) {
		t.Errorf("error %v, want an OutputError", err)
	}
	sleep, err := s.Start(t.Context(), client.Command{Path: "sleep", Args: []string{"100"}})
	if err != nil {
		t.Fatal(err)
	}
	go p.KillAll()
	if _, err := sleep.Wait(io.Discard, io.Discard); err == nil || errors.As(err, new(*client.OutputError)) {
		t.Errorf("the sandbox went away: error %v, want that of the stream", err)
	}
}

func TestFilesAreWrittenAndReadAsTheyAre(t *testing.T) {
	s := open(t)
	data := make([]byte, 3<<20)
	rand.Read(data)
	dir := t.TempDir()
	for _, test := range []struct {
		name string
		data []byte
		size int64
	}{
		{"with a known size", data, int64(len(data))},
		{"as a stream", data, -1},
		{"empty", nil, 0},
		{"an empty stream", nil, -1},
		{"a name to escape: é %41&?#", []byte("x"), 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(dir, "new", test.name)
			if err := s.WriteFile(t.Context(), path, "", bytes.NewReader(test.data), test.size); err != nil {
				t.Fatal(err)
			}
			body, err := s.ReadFile(t.Context(), path, "")
			if err != nil {
				t.Fatal(err)
			}
			defer body.Close()
			if got, err := io.ReadAll(body); err != nil || !bytes.Equal(got, test.data) {
				t.Errorf("read %d bytes, %v", len(got), err)
			}
		})
	}
	if _, err := s.ReadFile(t.Context(), filepath.Join(dir, "missing"), ""); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("read of a missing file: %v", err)
	}
	if err := s.WriteFile(t.Context(), dir, "", strings.NewReader("x"), 1); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("write to a directory: %v", err)
	}
	if _, err := s.Stat(t.Context(), filepath.Join(dir, "missing"), ""); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("stat of a missing file: %v", err)
	}
}
