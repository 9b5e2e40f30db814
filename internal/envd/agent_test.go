package envd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/filesystem/filesystemconnect"
	"github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/api/proto/process/processconnect"
	"github.com/wrenn/wrenn/internal/envd"
)

// agent is a running agent and how to reach it.
type agent struct {
	url   string
	http  *http.Client
	token string
}

func startAgent(t *testing.T) *agent {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- envd.New(envd.Config{}).Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	client := &http.Client{Transport: &http.Transport{DisableCompression: true}}
	t.Cleanup(client.CloseIdleConnections)
	return &agent{url: "http://" + l.Addr().String(), http: client}
}

// Do adds what the agent's user would send, so that it is an HTTP client for the
// RPC clients.
func (a *agent) Do(r *http.Request) (*http.Response, error) {
	if a.token != "" && r.Header.Get("X-Access-Token") == "" {
		r.Header.Set("X-Access-Token", a.token)
	}
	return a.http.Do(r)
}

func (a *agent) processes(opts ...connect.ClientOption) processconnect.ProcessClient {
	return processconnect.NewProcessClient(a, a.url, opts...)
}

func (a *agent) filesystem(opts ...connect.ClientOption) filesystemconnect.FilesystemClient {
	return filesystemconnect.NewFilesystemClient(a, a.url, opts...)
}

// call makes a plain HTTP request and returns status, header and body.
func (a *agent) call(t *testing.T, method, path string, body any, header ...string) (int, http.Header, []byte) {
	t.Helper()
	var reader io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		reader = strings.NewReader(b)
	case []byte:
		reader = bytes.NewReader(b)
	case io.Reader:
		reader = b
	default:
		data, err := json.Marshal(b)
		if err != nil {
			t.Fatal(err)
		}
		reader = bytes.NewReader(data)
	}
	r, err := http.NewRequestWithContext(t.Context(), method, a.url+path, reader)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := a.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, data
}

func (a *agent) init(t *testing.T, request map[string]any) int {
	t.Helper()
	status, _, _ := a.call(t, "POST", "/init", request)
	return status
}

// wantCode fails the test unless err has the code and mentions text.
func wantCode(t *testing.T, err error, code connect.Code, text string) {
	t.Helper()
	if connect.CodeOf(err) != code || err == nil || !strings.Contains(err.Error(), text) {
		t.Fatalf("got error %v, want %v mentioning %q", err, code, text)
	}
}

// needRoot skips a test that changes users.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can act as another user")
	}
}

// result is what a process wrote and how it ended.
type result struct {
	pid                   uint32
	stdout, stderr, pty   bytes.Buffer
	end                   *process.ProcessEvent_EndEvent
	keepalives, dataAfter int // dataAfter counts data after the end
}

// eventStream is what Start and Connect have in common.
type eventStream interface {
	Receive() bool
	Err() error
	Close() error
}

func drain(t *testing.T, s eventStream, next func() *process.ProcessEvent, r *result) {
	t.Helper()
	for s.Receive() {
		r.add(next())
	}
	if err := s.Err(); err != nil {
		t.Fatalf("stream: %v (stdout %.200q, stderr %.200q)", err, &r.stdout, &r.stderr)
	}
	if r.end == nil {
		t.Fatal("stream ended without an end event")
	}
	if r.dataAfter > 0 {
		t.Fatal("output came after the end event")
	}
}

func (r *result) add(e *process.ProcessEvent) {
	switch {
	case e.GetStart() != nil:
		r.pid = e.GetStart().GetPid()
	case e.GetData() != nil:
		if r.end != nil {
			r.dataAfter++
		}
		r.stdout.Write(e.GetData().GetStdout())
		r.stderr.Write(e.GetData().GetStderr())
		r.pty.Write(e.GetData().GetPty())
	case e.GetEnd() != nil:
		r.end = e.GetEnd()
	case e.GetKeepalive() != nil:
		r.keepalives++
	}
}

func bash(script string) *process.StartRequest {
	off := false
	return &process.StartRequest{Process: &process.ProcessConfig{Cmd: "/bin/bash", Args: []string{"-c", script}}, Stdin: &off}
}

// start starts a process and waits for its start event.
func start(ctx context.Context, t *testing.T, c processconnect.ProcessClient, req *process.StartRequest) (*connect.ServerStreamForClient[process.StartResponse], uint32) {
	t.Helper()
	s, err := c.Start(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if !s.Receive() {
		t.Fatalf("no start event: %v", s.Err())
	}
	if s.Msg().GetEvent().GetStart() == nil {
		t.Fatalf("first event is %v, want start", s.Msg())
	}
	return s, s.Msg().GetEvent().GetStart().GetPid()
}

// run runs a process to its end.
func run(t *testing.T, c processconnect.ProcessClient, req *process.StartRequest) *result {
	t.Helper()
	s, pid := start(t.Context(), t, c, req)
	r := &result{pid: pid}
	drain(t, s, func() *process.ProcessEvent { return s.Msg().GetEvent() }, r)
	return r
}

// eventually waits until ok holds; for things that no event tells of.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("not within 10 s: %s", what)
		}
	}
}
