package envd_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/api/proto/process/processconnect"
)

// missing is a pid that no process has: above the kernel's limit.
const missing = 1 << 23

func pid(n uint32) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: n}}
}

func tag(s string) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Tag{Tag: s}}
}

func TestProcessOutputAndEndReachTheClient(t *testing.T) {
	a := startAgent(t)
	for _, codec := range []struct {
		name string
		opts []connect.ClientOption
	}{{"binary", nil}, {"json", []connect.ClientOption{connect.WithProtoJSON()}}} {
		for _, tc := range []struct {
			name, script, stdout, stderr, status string
			code                                 int32
			exited                               bool
		}{
			{"success is exit status 0", "echo out; echo err >&2", "out\n", "err\n", "exit status 0", 0, true},
			{"a failure keeps its exit code", "printf x; exit 7", "x", "", "exit status 7", 7, true},
			{"a signal shows as code -1", "kill -KILL $$", "", "", "signal: killed", -1, false},
			{"bytes that are not text survive", `printf '\x00\xff\x80\n'`, "\x00\xff\x80\n", "", "exit status 0", 0, true},
			{"stdin not asked for is empty", "cat", "", "", "exit status 0", 0, true},
			{"stdout and stderr can be opened by name", "echo a >/dev/stdout; echo b >/dev/stderr", "a\n", "b\n", "exit status 0", 0, true},
			{"tee started by the shell says its last word", "exec > >(sleep 0.02; cat); echo late", "late\n", "", "exit status 0", 0, true},
		} {
			t.Run(codec.name+"/"+tc.name, func(t *testing.T) {
				r := run(t, a.processes(codec.opts...), bash(tc.script))
				if r.stdout.String() != tc.stdout || r.stderr.String() != tc.stderr {
					t.Errorf("got stdout %q stderr %q, want %q and %q", &r.stdout, &r.stderr, tc.stdout, tc.stderr)
				}
				e := r.end
				if e.GetExitCode() != tc.code || e.GetExited() != tc.exited || e.GetStatus() != tc.status {
					t.Errorf("got end %v, want code %d exited %v status %q", e, tc.code, tc.exited, tc.status)
				}
				if (e.Error != nil) != (tc.code != 0) || (tc.code != 0 && e.GetError() != tc.status) {
					t.Errorf("got error %q for code %d", e.GetError(), tc.code)
				}
			})
		}
	}
}

func TestStartRefusesWhatCannotRun(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "plain")
	if err := os.WriteFile(file, []byte("not a program"), 0o644); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("x", 1<<20)
	for _, tc := range []struct {
		name string
		cfg  *process.ProcessConfig
		code connect.Code
		text string
	}{
		{"no command", &process.ProcessConfig{}, connect.CodeInvalidArgument, "no command"},
		{"no config at all", nil, connect.CodeInvalidArgument, "no command"},
		{"unknown command", &process.ProcessConfig{Cmd: "no-such-command"}, connect.CodeInvalidArgument, "no-such-command"},
		{"unknown path", &process.ProcessConfig{Cmd: dir + "/none"}, connect.CodeInvalidArgument, "no such file"},
		{"not executable", &process.ProcessConfig{Cmd: file}, connect.CodeInvalidArgument, "permission denied"},
		{"a directory", &process.ProcessConfig{Cmd: dir}, connect.CodeInvalidArgument, "permission denied"},
		{"cwd missing", &process.ProcessConfig{Cmd: "true", Cwd: ptr(dir + "/gone")}, connect.CodeInvalidArgument, "cwd '" + dir + "/gone' does not exist"},
		{"cwd a file", &process.ProcessConfig{Cmd: "true", Cwd: &file}, connect.CodeInvalidArgument, "not a directory"},
		{"cwd of another user by tilde", &process.ProcessConfig{Cmd: "true", Cwd: ptr("~x")}, connect.CodeInvalidArgument, "~"},
		{"NUL in an argument", &process.ProcessConfig{Cmd: "true", Args: []string{"a\x00b"}}, connect.CodeInvalidArgument, "invalid argument"},
		{"NUL in a variable", &process.ProcessConfig{Cmd: "true", Envs: map[string]string{"A": "a\x00b"}}, connect.CodeInvalidArgument, "invalid argument"},
		{"an argument of 1 MiB", &process.ProcessConfig{Cmd: "true", Args: []string{long}}, connect.CodeInvalidArgument, "too long"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s, err := a.processes().Start(t.Context(), &process.StartRequest{Process: tc.cfg})
			if err == nil {
				defer s.Close()
				s.Receive()
				err = s.Err()
			}
			wantCode(t, err, tc.code, tc.text)
		})
	}
	if list := listed(t, a.processes()); len(list) != 0 {
		t.Errorf("refused processes are listed: %v", list)
	}
}

func ptr[T any](v T) *T { return &v }

func listed(t *testing.T, c processconnect.ProcessClient) []*process.ProcessInfo {
	t.Helper()
	resp, err := c.List(t.Context(), &process.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetProcesses()
}

func TestProcessRunsAsTheUserWithItsEnvironment(t *testing.T) {
	needRoot(t)
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Skip("there is no account nobody")
	}
	a := startAgent(t)
	if status := a.init(t, map[string]any{"envVars": map[string]string{"GLOBAL": "g", "BOTH": "global"}, "sandboxID": "sb1", "templateID": "tp1"}); status != 204 {
		t.Fatalf("init answered %d", status)
	}
	req := bash(`echo $(id -u):$(id -G) $HOME $USER $LOGNAME $PWD $GLOBAL $BOTH $OWN $E2B_SANDBOX $E2B_SANDBOX_ID $WRENN_TEMPLATE_ID; echo hi >/dev/stderr`)
	req.Process.Cwd = ptr("/")
	req.Process.Envs = map[string]string{"OWN": "o", "BOTH": "request"}
	c := a.processes(connect.WithInterceptors(basicUser("nobody")))
	r := run(t, c, req)
	want := fmt.Sprintf("%s:%s %s nobody nobody / g request o true sb1 tp1\n", nobody.Uid, nobody.Gid, nobody.HomeDir)
	if r.stdout.String() != want {
		t.Errorf("got %q, want %q", &r.stdout, want)
	}
	if r.stderr.String() != "hi\n" {
		t.Errorf("the user could not open its own stderr: %q", &r.stderr)
	}

	s, err := a.processes(connect.WithInterceptors(basicUser("who"))).Start(t.Context(), bash("true"))
	if err == nil {
		defer s.Close()
		s.Receive()
		err = s.Err()
	}
	wantCode(t, err, connect.CodeUnauthenticated, "invalid username: 'who'")
}

// basicUser names the user that requests act as.
func basicUser(name string) connect.Interceptor { return userHeader(name) }

type userHeader string

func (u userHeader) set(h interface{ Set(string, string) }) {
	r := newRequestWithUser(string(u))
	h.Set("Authorization", r)
}

func (u userHeader) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, r connect.AnyRequest) (connect.AnyResponse, error) {
		u.set(r.Header())
		return next(ctx, r)
	}
}

func (u userHeader) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		conn := next(ctx, spec)
		u.set(conn.RequestHeader())
		return conn
	}
}

func (u userHeader) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

func TestASleepyReaderGetsEveryByte(t *testing.T) {
	a := startAgent(t)
	const size = 24 << 20 // many times what is kept
	s, _ := start(t.Context(), t, a.processes(), bash(fmt.Sprintf("seq 1 100000000 | head -c %d", size)))
	got := sha256.New()
	n := 0
	for i := 0; s.Receive(); i++ {
		data := s.Msg().GetEvent().GetData().GetStdout()
		got.Write(data)
		n += len(data)
		if i%200 == 100 {
			time.Sleep(20 * time.Millisecond) // the reader is slow, that is the point
		}
	}
	if s.Err() != nil {
		t.Fatal(s.Err())
	}
	want := sha256.New()
	w := &limited{w: want, n: size}
	for i := 1; w.n > 0; i++ {
		fmt.Fprintln(w, i)
	}
	if n != size || !bytes.Equal(got.Sum(nil), want.Sum(nil)) {
		t.Errorf("got %d bytes with other content, want %d", n, size)
	}
}

type limited struct {
	w io.Writer
	n int
}

func (l *limited) Write(p []byte) (int, error) {
	k := min(len(p), l.n)
	l.n -= k
	l.w.Write(p[:k])
	return len(p), nil
}

func TestAProcessOutlivesItsClientAndIsNotHeldUp(t *testing.T) {
	a := startAgent(t)
	done := filepath.Join(t.TempDir(), "done")
	ctx, leave := context.WithCancel(t.Context())
	_, id := start(ctx, t, a.processes(), bash("seq 1 2000000; echo fin > "+done+"; sleep 100"))
	leave()
	eventually(t, "the process writes 14 MB that nobody reads and goes on", func() bool {
		_, err := os.Stat(done)
		return err == nil
	})
	c, err := a.processes().Connect(t.Context(), &process.ConnectRequest{Process: pid(id)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if !c.Receive() || c.Msg().GetEvent().GetStart().GetPid() != id {
		t.Fatalf("connect gave %v, %v", c.Msg(), c.Err())
	}
	if _, err := a.processes().SendSignal(t.Context(), &process.SendSignalRequest{Process: pid(id), Signal: process.Signal_SIGNAL_SIGTERM}); err != nil {
		t.Fatal(err)
	}
	r := &result{}
	drain(t, c, func() *process.ProcessEvent { return c.Msg().GetEvent() }, r)
	if r.end.GetStatus() != "signal: terminated" {
		t.Errorf("got end %v", r.end)
	}
}

func TestTheEndDoesNotWaitForBackgroundChildren(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	// The child keeps stdout open, and writes to it after the end: it must not
	// die of that.
	began := time.Now()
	r := run(t, a.processes(), bash("mkfifo "+dir+"/go; (read x < "+dir+"/go; echo more && echo alive > "+dir+"/alive) & echo first"))
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("the end came after %v", took)
	}
	if r.stdout.String() != "first\n" {
		t.Errorf("got %q", &r.stdout)
	}
	if err := os.WriteFile(dir+"/go", []byte("x\n"), 0); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the child writes to the stdout it was given", func() bool {
		_, err := os.Stat(dir + "/alive")
		return err == nil
	})
}

func TestALateConnectGetsTheEnd(t *testing.T) {
	a := startAgent(t)
	req := bash("exit 5")
	req.Tag = ptr("late")
	run(t, a.processes(), req)
	c, err := a.processes().Connect(t.Context(), &process.ConnectRequest{Process: tag("late")})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := &result{}
	drain(t, c, func() *process.ProcessEvent { return c.Msg().GetEvent() }, r)
	if r.end.GetExitCode() != 5 {
		t.Errorf("got end %v", r.end)
	}
	if list := listed(t, a.processes()); len(list) != 0 {
		t.Errorf("an ended process is listed: %v", list)
	}
	_, err = a.processes().SendSignal(t.Context(), &process.SendSignalRequest{Process: tag("late"), Signal: process.Signal_SIGNAL_SIGKILL})
	wantCode(t, err, connect.CodeNotFound, "late")
}

func TestListShowsWhatRuns(t *testing.T) {
	a := startAgent(t)
	req := bash("sleep 100")
	req.Tag = ptr("mine")
	s, id := start(t.Context(), t, a.processes(), req)
	list := listed(t, a.processes())
	if len(list) != 1 || list[0].GetPid() != id || list[0].GetTag() != "mine" || list[0].GetConfig().GetCmd() != "/bin/bash" {
		t.Fatalf("got %v", list)
	}
	if _, err := a.processes().SendSignal(t.Context(), &process.SendSignalRequest{Process: tag("mine"), Signal: process.Signal_SIGNAL_SIGKILL}); err != nil {
		t.Fatal(err)
	}
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if r.end.GetExitCode() != -1 || r.end.GetError() != "signal: killed" {
		t.Errorf("got end %v", r.end)
	}
	if list := listed(t, a.processes()); len(list) != 0 {
		t.Errorf("listed after the end: %v", list)
	}
}

func TestASilentStreamIsKeptAlive(t *testing.T) {
	a := startAgent(t)
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set("Keepalive-Ping-Interval", "1")
	s, _ := start(ctx, t, a.processes(), bash("sleep 1.5"))
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if r.keepalives != 1 {
		t.Errorf("got %d keepalives in 1.5 s at an interval of 1 s", r.keepalives)
	}
}

func TestRequestsAboutUnknownProcessesAreNotFound(t *testing.T) {
	c, ctx := startAgent(t).processes(), t.Context()
	in := &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte("x")}}
	for _, sel := range []*process.ProcessSelector{pid(missing), tag("none"), nil} {
		code := connect.CodeNotFound
		if sel == nil {
			code = connect.CodeInvalidArgument
		}
		_, err := c.SendInput(ctx, &process.SendInputRequest{Process: sel, Input: in})
		wantCode(t, err, code, "process")
		_, err = c.SendSignal(ctx, &process.SendSignalRequest{Process: sel, Signal: process.Signal_SIGNAL_SIGKILL})
		wantCode(t, err, code, "process")
		_, err = c.CloseStdin(ctx, &process.CloseStdinRequest{Process: sel})
		wantCode(t, err, code, "process")
		_, err = c.Update(ctx, &process.UpdateRequest{Process: sel})
		wantCode(t, err, code, "process")
		s, err := c.Connect(ctx, &process.ConnectRequest{Process: sel})
		if err == nil {
			s.Receive()
			err = s.Err()
			s.Close()
		}
		wantCode(t, err, code, "process")
	}
	_, err := c.SendSignal(ctx, &process.SendSignalRequest{Process: pid(missing), Signal: 3})
	wantCode(t, err, connect.CodeInvalidArgument, "signal")
}

func TestRapidProcessesAllReportTheirOwnExitCode(t *testing.T) {
	a := startAgent(t)
	failures := make(chan error, 8)
	for worker := range 8 {
		go func() {
			for i := range 25 {
				want := (worker*25 + i) % 256
				s, err := a.processes().Start(t.Context(), bash("exit "+strconv.Itoa(want)))
				if err != nil {
					failures <- err
					return
				}
				r := &result{}
				for s.Receive() {
					r.add(s.Msg().GetEvent())
				}
				s.Close()
				if int(r.end.GetExitCode()) != want {
					failures <- fmt.Errorf("got %v (%v), want exit code %d", r.end, s.Err(), want)
					return
				}
			}
			failures <- nil
		}()
	}
	for range 8 {
		if err := <-failures; err != nil {
			t.Error(err)
		}
	}
}
