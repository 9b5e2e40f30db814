package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/api/proto/process/processconnect"
)

// box is a sandbox as a client has it.
type box struct {
	p         *platform
	id, token string
	instance  string // what it ran in when the test met it
	processes processconnect.ProcessClient
}

// create starts a sandbox from the base template.
func (p *platform) create(options map[string]any) *box {
	p.t.Helper()
	body := map[string]any{"templateID": "base", "timeout": 300}
	maps.Copy(body, options)
	status, answer := p.api("POST", "/v2/sandboxes", body)
	var s struct {
		SandboxID       string `json:"sandboxID"`
		EnvdAccessToken string `json:"envdAccessToken"`
	}
	if status != http.StatusCreated || json.Unmarshal(answer, &s) != nil {
		p.t.Fatalf("create sandbox: %d %s\n%s", status, answer, p.logTail())
	}
	return p.box(s.SandboxID, s.EnvdAccessToken)
}

// box returns a client of a sandbox that is there already.
func (p *platform) box(id, token string) *box {
	b := &box{p: p, id: id, token: token, instance: p.instanceOf(id)}
	b.processes = processconnect.NewProcessClient(&http.Client{Transport: b}, p.url, connect.WithProtoJSON())
	return b
}

// instanceOf is the id of the instance that a sandbox runs in, which names its
// processes and cgroups; empty when it runs in none.
func (p *platform) instanceOf(id string) string {
	data, err := os.ReadFile(filepath.Join(p.dir, "agent", "sandboxes", id, "record.json"))
	var record struct{ Instance string }
	if err != nil || json.Unmarshal(data, &record) != nil {
		return ""
	}
	return record.Instance
}

// RoundTrip adds the headers that take a request to the sandbox's agent, as root.
func (b *box) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("E2b-Sandbox-Id", b.id)
	r.Header.Set("E2b-Sandbox-Port", "49983")
	r.Header.Set("X-Access-Token", b.token)
	r.SetBasicAuth("root", "") // whom envd runs processes as
	return http.DefaultTransport.RoundTrip(r)
}

// result is how a command ended.
type result struct {
	stdout, stderr string
	exit           int
	err            error // of the stream; exit means nothing then
}

func (r result) String() string {
	return fmt.Sprintf("exit %d, error %v\nstdout: %s\nstderr: %s", r.exit, r.err, r.stdout, r.stderr)
}

// try runs a script as root and waits for its end.
func (b *box) try(script string) result {
	ctx, cancel := context.WithTimeout(context.Background(), 90*time.Second)
	defer cancel()
	stream, err := b.processes.Start(ctx, &process.StartRequest{
		Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}}, Stdin: new(bool),
	})
	if err != nil {
		return result{err: err}
	}
	defer stream.Close()
	var stdout, stderr strings.Builder
	for stream.Receive() {
		switch e := stream.Msg().GetEvent().GetEvent().(type) {
		case *process.ProcessEvent_Data:
			stdout.Write(e.Data.GetStdout())
			stderr.Write(e.Data.GetStderr())
		case *process.ProcessEvent_End:
			return result{stdout.String(), stderr.String(), int(e.End.GetExitCode()), nil}
		}
	}
	err = stream.Err()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return result{stdout.String(), stderr.String(), 0, err}
}

// run runs a script that must succeed, and returns what it printed.
func (b *box) run(script string) string {
	b.p.t.Helper()
	r := b.try(script)
	if r.err != nil || r.exit != 0 {
		b.p.t.Fatalf("%s\n%s", script, r)
	}
	return r.stdout
}

// session is a process whose output arrives as it comes.
type session struct {
	b      *box
	pid    uint32
	output func() string // so far
	ended  chan error    // gets the stream's end: nil after the process's own
	cancel context.CancelFunc
}

// background starts a script and does not wait for it; terminal gives it one.
func (b *box) background(script string, terminal bool) *session {
	b.p.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	config := &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}}
	req := &process.StartRequest{Process: config, Stdin: new(bool)}
	if terminal {
		config.Args = []string{"--norc", "-i"}
		req.Pty = &process.PTY{Size: &process.PTY_Size{Cols: 80, Rows: 24}}
	}
	stream, err := b.processes.Start(ctx, req)
	if err != nil {
		cancel()
		b.p.t.Fatalf("start %q: %v", script, err)
	}
	return b.follow(cancel, func() *process.ProcessEvent { return stream.Msg().GetEvent() }, stream)
}

// attach follows a process that runs already.
func (b *box) attach(pid uint32) *session {
	b.p.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := b.processes.Connect(ctx, &process.ConnectRequest{Process: byPID(pid)})
	if err != nil {
		cancel()
		b.p.t.Fatalf("connect to process %d: %v", pid, err)
	}
	return b.follow(cancel, func() *process.ProcessEvent { return stream.Msg().GetEvent() }, stream)
}

type eventStream interface {
	Receive() bool
	Err() error
	Close() error
}

func (b *box) follow(cancel context.CancelFunc, event func() *process.ProcessEvent, stream eventStream) *session {
	b.p.t.Helper()
	if !stream.Receive() {
		cancel()
		b.p.t.Fatalf("first event of a process: %v", stream.Err())
	}
	var out lockedBuffer
	s := &session{b: b, pid: event().GetStart().GetPid(), output: out.String, ended: make(chan error, 1), cancel: cancel}
	b.p.t.Cleanup(cancel)
	go func() {
		defer stream.Close()
		for stream.Receive() {
			switch e := event().GetEvent().(type) {
			case *process.ProcessEvent_Data:
				out.Write(bytes.Join([][]byte{e.Data.GetStdout(), e.Data.GetStderr(), e.Data.GetPty()}, nil))
			case *process.ProcessEvent_End:
				s.ended <- nil
				return
			}
		}
		if err := stream.Err(); err != nil {
			s.ended <- err
		} else {
			s.ended <- io.ErrUnexpectedEOF
		}
	}()
	return s
}

// says waits until the process has printed text.
func (s *session) says(text string) {
	s.b.p.t.Helper()
	eventually(s.b.p.t, 15*time.Second, fmt.Sprintf("process prints %q", text), func() error {
		if out := s.output(); !strings.Contains(out, text) {
			return fmt.Errorf("it printed %q", out)
		}
		return nil
	})
}

// types sends keystrokes to the process's terminal.
func (s *session) types(text string) {
	s.b.p.t.Helper()
	_, err := s.b.processes.SendInput(context.Background(), &process.SendInputRequest{
		Process: byPID(s.pid), Input: &process.ProcessInput{Input: &process.ProcessInput_Pty{Pty: []byte(text)}},
	})
	if err != nil {
		s.b.p.t.Fatalf("type %q: %v", text, err)
	}
}

// end waits for the end of the stream.
func (s *session) end(limit time.Duration) error {
	s.b.p.t.Helper()
	select {
	case err := <-s.ended:
		return err
	case <-time.After(limit):
		s.b.p.t.Fatalf("the stream of process %d did not end within %s", s.pid, limit)
		return nil
	}
}

func (b *box) kill() {
	b.p.t.Helper()
	if status, body := b.p.api("DELETE", "/sandboxes/"+b.id, nil); status != http.StatusNoContent {
		b.p.t.Fatalf("kill sandbox %s: %d %s", b.id, status, body)
	}
}

// gone waits until the API answers 404 for the sandbox, and returns its message.
func (b *box) gone(t testing.TB, limit time.Duration) string {
	t.Helper()
	var message string
	eventually(t, limit, "sandbox "+b.id+" is gone", func() error {
		status, body := b.p.api("GET", "/sandboxes/"+b.id, nil)
		if status != http.StatusNotFound {
			return fmt.Errorf("GET answers %d %s", status, body)
		}
		message = string(body)
		return nil
	})
	return message
}

func byPID(pid uint32) *process.ProcessSelector {
	return &process.ProcessSelector{Selector: &process.ProcessSelector_Pid{Pid: pid}}
}

// fetch gets a path from a server in the sandbox through the data plane.
func (b *box) fetch(port int, path string) (int, string) {
	b.p.t.Helper()
	req, err := http.NewRequest("GET", b.p.url+path, nil)
	if err != nil {
		b.p.t.Fatal(err)
	}
	req.Header.Set("E2b-Sandbox-Id", b.id)
	req.Header.Set("E2b-Sandbox-Port", fmt.Sprint(port))
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return resp.StatusCode, err.Error()
	}
	return resp.StatusCode, string(body)
}
