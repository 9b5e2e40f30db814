package envd_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/process"
)

func newRequestWithUser(name string) string {
	return "Basic " + base64.StdEncoding.EncodeToString([]byte(name+":"))
}

func stdinOf(data string) *process.ProcessInput {
	return &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: []byte(data)}}
}

func ptyOf(data string) *process.ProcessInput {
	return &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: []byte(data)}}
}

func onTerminal(script string) *process.StartRequest {
	return &process.StartRequest{
		Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}},
		Pty:     &process.PTY{Size: &process.PTY_Size{Cols: 80, Rows: 24}},
	}
}

func TestStdinArrivesWholeAndEnds(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	// Stdin is there also for clients that do not say whether they want it.
	s, id := start(t.Context(), t, c, &process.StartRequest{Process: &process.ProcessConfig{Cmd: "cat"}})
	var want strings.Builder
	for i := range 300 {
		chunk := strings.Repeat(fmt.Sprintf("line %d\n", i), 100) // together more than a pipe holds
		want.WriteString(chunk)
		if _, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id), Input: stdinOf(chunk)}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id), Input: stdinOf("")}); err != nil {
		t.Errorf("empty input: %v", err)
	}
	if _, err := c.CloseStdin(t.Context(), &process.CloseStdinRequest{Process: pid(id)}); err != nil {
		t.Fatal(err)
	}
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if r.stdout.String() != want.String() || r.end.GetExitCode() != 0 {
		t.Errorf("got %d bytes and %v, want %d bytes", r.stdout.Len(), r.end, want.Len())
	}
}

func TestInputOfTheWrongKindIsRefused(t *testing.T) {
	c := startAgent(t).processes()
	_, piped := start(t.Context(), t, c, &process.StartRequest{Process: &process.ProcessConfig{Cmd: "sleep", Args: []string{"100"}}})
	_, term := start(t.Context(), t, c, onTerminal("sleep 100"))
	_, closed := start(t.Context(), t, c, bash("sleep 100"))
	defer func() {
		for _, id := range []uint32{piped, term, closed} {
			c.SendSignal(t.Context(), &process.SendSignalRequest{Process: pid(id), Signal: process.Signal_SIGNAL_SIGKILL})
		}
	}()
	for _, tc := range []struct {
		name string
		id   uint32
		in   *process.ProcessInput
		code connect.Code
		text string
	}{
		{"terminal input for a pipe", piped, ptyOf("x"), connect.CodeInternal, "no terminal"},
		{"stdin for a terminal", term, stdinOf("x"), connect.CodeInternal, "terminal"},
		{"stdin that was not asked for", closed, stdinOf("x"), connect.CodeInternal, "not open"},
		{"nothing", piped, nil, connect.CodeInvalidArgument, "no input"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(tc.id), Input: tc.in})
			wantCode(t, err, tc.code, tc.text)
		})
	}
	_, err := c.CloseStdin(t.Context(), &process.CloseStdinRequest{Process: pid(term)})
	wantCode(t, err, connect.CodeUnimplemented, "Ctrl-D")
	_, err = c.Update(t.Context(), &process.UpdateRequest{Process: pid(piped), Pty: &process.PTY{Size: &process.PTY_Size{Cols: 1, Rows: 1}}})
	wantCode(t, err, connect.CodeInternal, "no terminal")
}

func TestKeystrokesArriveInOrderAndNoneIsLost(t *testing.T) {
	a := startAgent(t)
	c := a.processes(connect.WithProtoJSON())
	const strokes = 3000 // more than a terminal's input queue holds
	s, id := start(t.Context(), t, c, onTerminal(fmt.Sprintf("stty raw -echo; printf R; sleep 0.3; head -c %d", strokes)))
	if !s.Receive() || string(s.Msg().GetEvent().GetData().GetPty()) != "R" {
		t.Fatalf("got %v, %v", s.Msg(), s.Err())
	}
	in, err := c.StreamInput(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	send := func(m *process.StreamInputRequest) {
		if err := in.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Start{Start: &process.StreamInputRequest_StartEvent{Process: pid(id)}}})
	var want bytes.Buffer
	for i := range strokes {
		key := string(rune('a' + i%26))
		want.WriteString(key)
		send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Data{Data: &process.StreamInputRequest_DataEvent{Input: ptyOf(key)}}})
	}
	if _, err := in.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if r.pty.String() != want.String() {
		t.Errorf("got %d keystrokes, want %d, in order", r.pty.Len(), want.Len())
	}
}

func TestATerminalHasASizeThatCanChange(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	s, id := start(t.Context(), t, c, onTerminal(`test -t 0 && test -t 1 && tty >/dev/null && stty size; trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.05; done`))
	r := &result{}
	for !strings.Contains(r.pty.String(), "ready") && s.Receive() {
		r.add(s.Msg().GetEvent())
	}
	if _, err := c.Update(t.Context(), &process.UpdateRequest{Process: pid(id), Pty: &process.PTY{Size: &process.PTY_Size{Cols: 132, Rows: 50}}}); err != nil {
		t.Fatal(err)
	}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if got := r.pty.String(); got != "24 80\r\nready\r\n50 132\r\n" || r.end.GetExitCode() != 3 {
		t.Errorf("got %q and %v", got, r.end)
	}
}

func TestTwoClientsSeeOneTerminal(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	s, id := start(t.Context(), t, c, onTerminal("read x; echo got $x"))
	second, err := c.Connect(t.Context(), &process.ConnectRequest{Process: pid(id)})
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if !second.Receive() {
		t.Fatal(second.Err())
	}
	if _, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id), Input: ptyOf("me\n")}); err != nil {
		t.Fatal(err)
	}
	r1, r2 := &result{}, &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r1)
	drain(t, second, func() *process.ProcessEvent { return second.Msg().GetEvent() }, r2)
	for _, r := range []*result{r1, r2} {
		if !strings.Contains(r.pty.String(), "got me\r\n") {
			t.Errorf("got %q", &r.pty)
		}
	}
}

func TestAProgramMayCloseItsTerminalAndOpenItAgain(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	closed := filepath.Join(t.TempDir(), "closed")
	s, id := start(t.Context(), t, c, onTerminal(`
		exec </dev/null >/dev/null 2>&1; sleep 0.1; touch `+closed+`
		exec </dev/tty >/dev/tty 2>&1; read x; echo got $x; exit 3`))
	eventually(t, "the program goes on without its terminal", func() bool {
		_, err := os.Stat(closed)
		return err == nil
	})
	if _, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id), Input: ptyOf("me\n")}); err != nil {
		t.Fatal(err)
	}
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if !strings.Contains(r.pty.String(), "got me\r\n") || r.end.GetExitCode() != 3 {
		t.Errorf("got %q and %v", &r.pty, r.end)
	}
}

func TestOutputOfAChildThatOutlivesItsTerminalsShellIsDelivered(t *testing.T) {
	a := startAgent(t)
	r := run(t, a.processes(), onTerminal("trap '' HUP; (sleep 0.02; echo late) & echo early"))
	if got := r.pty.String(); got != "early\r\nlate\r\n" {
		t.Errorf("got %q", got)
	}
}

func TestTheTerminalBelongsToTheUser(t *testing.T) {
	needRoot(t)
	a := startAgent(t)
	req := onTerminal("echo works > $(tty); stat -c %U $(tty)")
	req.Process.Cwd = ptr("/")
	r := run(t, a.processes(connect.WithInterceptors(basicUser("nobody"))), req)
	if got := r.pty.String(); got != "works\r\nnobody\r\n" {
		t.Errorf("got %q", got)
	}
}

// A terminal's descriptors, and those of its process, are given back.
func TestNothingIsLeftOfEndedProcesses(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	run(t, c, onTerminal("true"))
	before := count()
	for range 20 {
		run(t, c, onTerminal("echo x"))
		run(t, c, &process.StartRequest{Process: &process.ProcessConfig{Cmd: "echo"}})
	}
	eventually(t, "descriptors are back to what they were", func() bool { return count() <= before+2 })
}

func TestInputThatNobodyReadsFailsWhenTheProcessEnds(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	// A child keeps the pipe open and does not read it: only the end of the
	// process tells that nobody will.
	s, id := start(t.Context(), t, c, &process.StartRequest{Process: &process.ProcessConfig{
		Cmd: "/bin/bash", Args: []string{"-c", "sleep 3 <&0 & echo up; sleep 0.3"}}})
	if !s.Receive() {
		t.Fatal(s.Err())
	}
	_, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id), Input: stdinOf(strings.Repeat("x", 1<<20))})
	wantCode(t, err, connect.CodeNotFound, "process has ended")
}

func TestTenThousandSingleKeystrokesArriveInOrder(t *testing.T) {
	c := startAgent(t).processes(connect.WithProtoJSON())
	const strokes = 10000
	s, id := start(t.Context(), t, c, onTerminal(fmt.Sprintf("stty raw -echo; printf R; sleep 0.3; head -c %d", strokes)))
	if !s.Receive() || string(s.Msg().GetEvent().GetData().GetPty()) != "R" {
		t.Fatalf("got %v, %v", s.Msg(), s.Err())
	}
	var want bytes.Buffer
	for i := range strokes {
		key := string(rune('a' + i%26))
		want.WriteString(key)
		if _, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id), Input: ptyOf(key)}); err != nil {
			t.Fatal(err)
		}
	}
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if r.pty.String() != want.String() {
		t.Errorf("got %d keystrokes, want %d, in order", r.pty.Len(), want.Len())
	}
}

// A paste that is many times what the kernel's queues hold, into a program that
// does not read for a while, over HTTP/2.
func TestALongPasteWaitsForItsReader(t *testing.T) {
	a := startAgent(t)
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	a.http.Transport = &http.Transport{Protocols: protocols}
	c := a.processes()
	paste := string(numbers(60000)) // 350 kB
	s, id := start(t.Context(), t, c, onTerminal(fmt.Sprintf("stty raw -echo; printf R; sleep 0.5; head -c %d", len(paste))))
	if !s.Receive() || string(s.Msg().GetEvent().GetData().GetPty()) != "R" {
		t.Fatalf("got %v, %v", s.Msg(), s.Err())
	}
	in, err := c.StreamInput(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := in.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Start{Start: &process.StreamInputRequest_StartEvent{Process: pid(id)}}}); err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(paste); at += 1000 {
		part := ptyOf(paste[at:min(at+1000, len(paste))])
		if err := in.Send(&process.StreamInputRequest{Event: &process.StreamInputRequest_Data{Data: &process.StreamInputRequest_DataEvent{Input: part}}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := in.CloseAndReceive(); err != nil {
		t.Fatal(err)
	}
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if r.pty.String() != paste {
		t.Errorf("got %d bytes of %d, or others", r.pty.Len(), len(paste))
	}
}

func TestAHugeInputIsExactAndClosingWaitsForIt(t *testing.T) {
	a := startAgent(t)
	c := a.processes()
	const size = 32 << 20
	begin := t.TempDir() + "/begin"
	s, id := start(t.Context(), t, c, &process.StartRequest{Process: &process.ProcessConfig{
		Cmd: "/bin/bash", Args: []string{"-c", "until read -t 0; do sleep 0.01; done; echo begun; while [ ! -e $0 ]; do sleep 0.01; done; sha256sum", begin}}})
	data := bytes.Repeat([]byte("0123456789abcde\n"), size/16)
	failed := make(chan error, 2)
	go func() {
		_, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id),
			Input: &process.ProcessInput{Input: &process.ProcessInput_Stdin{Stdin: data}}})
		failed <- err
	}()
	if !s.Receive() || string(s.Msg().GetEvent().GetData().GetStdout()) != "begun\n" {
		t.Fatalf("got %v, %v", s.Msg(), s.Err())
	}
	go func() {
		_, err := c.CloseStdin(t.Context(), &process.CloseStdinRequest{Process: pid(id)})
		failed <- err
	}()
	if err := os.WriteFile(begin, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	for range 2 {
		if err := <-failed; err != nil {
			t.Error(err)
		}
	}
	if want := fmt.Sprintf("%x  -\n", sha256.Sum256(data)); r.stdout.String() != want {
		t.Errorf("got %q, want %q", &r.stdout, want)
	}
	_, err := c.SendInput(t.Context(), &process.SendInputRequest{Process: pid(id), Input: stdinOf("late")})
	wantCode(t, err, connect.CodeNotFound, "process")
}

func TestOutputPutsOffKeepalives(t *testing.T) {
	c := startAgent(t).processes()
	ctx, info := connect.NewClientContext(t.Context())
	info.RequestHeader().Set("Keepalive-Ping-Interval", "1")
	s, _ := start(ctx, t, c, bash("for i in 1 2 3 4 5 6; do sleep 0.3; echo $i; done"))
	r := &result{}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	if r.keepalives != 0 || r.stdout.String() != "1\n2\n3\n4\n5\n6\n" {
		t.Errorf("got %d keepalives and %q", r.keepalives, &r.stdout)
	}
}
