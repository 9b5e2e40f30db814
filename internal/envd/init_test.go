package envd_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/internal/envd"
)

// asInit makes the test binary serve as the agent on an inherited listener.
const asInit = "ENVD_TEST_SERVE_AS_INIT"

func TestMain(m *testing.M) {
	if os.Getenv(asInit) == "" {
		os.Exit(m.Run())
	}
	l, err := net.FileListener(os.NewFile(3, "listener"))
	if err == nil {
		err = envd.New(envd.Config{Init: envd.IsInit()}).Serve(context.Background(), l)
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func TestAsPidOneItReapsOrphansAndKeepsItsChildrensExitCodes(t *testing.T) {
	needRoot(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f, err := l.(*net.TCPListener).File()
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), asInit+"=1")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWPID, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Skipf("cannot make a pid namespace: %v", err)
	}
	f.Close()
	defer func() {
		cmd.Process.Kill()
		cmd.Wait()
	}()
	a := &agent{url: "http://" + l.Addr().String(), http: &http.Client{}}
	defer a.http.CloseIdleConnections()
	// Orphans are made in a storm of children that report exit codes.
	for i := range 40 {
		r := run(t, a.processes(), bash(fmt.Sprintf("for i in 1 2 3; do (sh -c 'exit 9' & ) ; done; exit %d", i)))
		if int(r.end.GetExitCode()) != i {
			t.Fatalf("got %v, want exit code %d", r.end, i)
		}
	}
	eventually(t, "no zombies are left", func() bool {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", cmd.Process.Pid, cmd.Process.Pid))
		if err != nil {
			t.Skip("the kernel does not list children")
		}
		return len(strings.Fields(string(children))) == 0
	})
}

func TestInitSetsAndProtectsTheToken(t *testing.T) {
	a := startAgent(t)
	now := time.Now().UTC()
	stamp := func(d time.Duration) string { return now.Add(d).Format(time.RFC3339Nano) }
	status := func(want int, what string, request map[string]any, header ...string) {
		t.Helper()
		got, h, _ := a.call(t, "POST", "/init", request, header...)
		if got != want || h.Get("X-Envd-Version") != envd.Version {
			t.Errorf("%s: got %d (version %q), want %d", what, got, h.Get("X-Envd-Version"), want)
		}
	}
	reachable := func(want bool, token string) {
		t.Helper()
		got, _, _ := a.call(t, "GET", "/envs", nil, "X-Access-Token", token)
		if (got == 200) != want {
			t.Errorf("with token %q: got %d", token, got)
		}
	}
	reachable(true, "")
	status(204, "first token", map[string]any{"accessToken": "one", "timestamp": stamp(0), "unknown": []int{1}})
	reachable(true, "one")
	reachable(false, "")
	reachable(false, "onex")
	status(401, "no token", map[string]any{"timestamp": stamp(time.Second)})
	status(401, "wrong token", map[string]any{"accessToken": "two", "timestamp": stamp(time.Second)})
	reachable(true, "one")
	status(204, "new token, old one in the header", map[string]any{"accessToken": "two", "timestamp": stamp(2 * time.Second)}, "X-Access-Token", "one")
	reachable(true, "two")
	status(204, "an old request is ignored", map[string]any{"timestamp": stamp(time.Second), "envVars": map[string]string{"OLD": "1"}}, "X-Access-Token", "two")
	reachable(false, "")
	status(204, "absent token clears it", map[string]any{"timestamp": stamp(3 * time.Second)}, "X-Access-Token", "two")
	reachable(true, "")
	status(204, "a resume on a host whose clock is behind", map[string]any{"accessToken": "three", "timestamp": stamp(-time.Hour), "lifecycleID": "second"})
	reachable(true, "three")
	reachable(false, "")
	status(204, "an old request after it", map[string]any{"timestamp": stamp(-2 * time.Hour), "lifecycleID": "second"}, "X-Access-Token", "three")
	reachable(false, "")
	status(204, "a young one", map[string]any{"timestamp": stamp(-time.Minute), "lifecycleID": "second"}, "X-Access-Token", "three")
	reachable(true, "")
	if got, _, _ := a.call(t, "POST", "/init", "{"); got != 400 {
		t.Errorf("broken body: got %d", got)
	}
	if got, _, _ := a.call(t, "POST", "/init", nil); got != 204 {
		t.Errorf("empty body: got %d", got)
	}
}

func TestEveryRouteButTheOpenOnesNeedsTheToken(t *testing.T) {
	a := startAgent(t)
	if got := a.init(t, map[string]any{"accessToken": "secret"}); got != 204 {
		t.Fatal(got)
	}
	for _, tc := range []struct {
		method, path string
		status       int
		text         string
	}{
		{"GET", "/health", 204, ""},
		{"GET", "/metrics", 401, "unauthorized access, please provide a valid access token"},
		{"GET", "/envs", 401, "unauthorized access"},
		{"GET", "/logs", 401, "unauthorized access"},
		{"GET", "/nothing", 401, "unauthorized access"},
		{"POST", "/files/compose", 401, "unauthorized access"},
		{"POST", "/process.Process/List", 401, "unauthorized access"},
		{"POST", "//process.Process/List", 401, "unauthorized access"},
		{"GET", "/files?path=/etc/hostname", 401, "missing signature query parameter"},
		{"POST", "/files?path=/tmp/x&signature=v1_x", 401, "invalid signature"},
	} {
		status, _, body := a.call(t, tc.method, tc.path, nil)
		if status == http.StatusTemporaryRedirect || status == http.StatusMovedPermanently {
			continue // cleaned path, asked for again
		}
		if status != tc.status || !strings.Contains(string(body), tc.text) {
			t.Errorf("%s %s: got %d %s", tc.method, tc.path, status, body)
		}
		if tc.status == 401 {
			var shape struct {
				Code    int
				Message string
			}
			if err := json.Unmarshal(body, &shape); err != nil || shape.Code != 401 || shape.Message == "" {
				t.Errorf("%s %s: error has the shape %s", tc.method, tc.path, body)
			}
		}
	}
	_, err := a.filesystem().Stat(t.Context(), &filesystem.StatRequest{Path: "/"})
	wantCode(t, err, connect.CodeUnauthenticated, "")
	a.token = "secret"
	if _, err := a.filesystem().Stat(t.Context(), &filesystem.StatRequest{Path: "/"}); err != nil {
		t.Error(err)
	}
	if status, _, _ := a.call(t, "GET", "/nothing", nil); status != 404 {
		t.Errorf("unknown route with token: got %d", status)
	}
}

func TestMetricsEnvsAndLogs(t *testing.T) {
	a := startAgent(t)
	a.init(t, map[string]any{"envVars": map[string]string{"SECRET": "hush"}})
	run(t, a.processes(), bash("echo $SECRET; exit 4"))
	var metrics map[string]float64
	_, _, body := a.call(t, "GET", "/metrics", nil)
	if err := json.Unmarshal(body, &metrics); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"ts", "cpu_count", "mem_total", "mem_used", "disk_total", "mem_total_mib"} {
		if metrics[name] <= 0 {
			t.Errorf("%s is %v in %s", name, metrics[name], body)
		}
	}
	_, _, body = a.call(t, "GET", "/envs", nil)
	var envs map[string]string
	if err := json.Unmarshal(body, &envs); err != nil || envs["SECRET"] != "hush" || envs["E2B_SANDBOX"] != "true" {
		t.Errorf("envs are %s", body)
	}
	var entries []struct {
		Time    time.Time
		Level   string
		Message string
		Fields  map[string]any
	}
	_, _, body = a.call(t, "GET", "/logs", nil)
	if err := json.Unmarshal(body, &entries); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(body), "hush") {
		t.Errorf("the log tells a variable's value: %s", body)
	}
	last := entries[len(entries)-1]
	if last.Message != "process ended" || last.Fields["exit_code"] != 4.0 || last.Fields["cmd"] != "/bin/bash" || last.Level != "info" {
		t.Errorf("last entry is %+v", last)
	}
	_, _, body = a.call(t, "GET", "/logs?after="+strconv.FormatInt(last.Time.UnixNano(), 10), nil)
	if strings.TrimSpace(string(body)) != "[]" {
		t.Errorf("after the last entry there is %s", body)
	}
	if status, _, _ := a.call(t, "GET", "/logs?after=x", nil); status != 400 {
		t.Errorf("bad after: got %d", status)
	}
}

func TestPagesOfAnyOriginAreAllowed(t *testing.T) {
	a := startAgent(t)
	a.init(t, map[string]any{"accessToken": "secret"})
	status, h, _ := a.call(t, "OPTIONS", "/process.Process/Start", nil, "Origin", "https://x.example",
		"Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "x-access-token,content-type")
	if status != 204 || h.Get("Access-Control-Allow-Origin") != "*" || h.Get("Access-Control-Allow-Headers") != "x-access-token,content-type" || h.Get("Access-Control-Max-Age") != "7200" {
		t.Errorf("preflight: got %d %v", status, h)
	}
}

func TestOnePortSpeaksBothHTTPVersions(t *testing.T) {
	a := startAgent(t)
	protocols := new(http.Protocols)
	protocols.SetUnencryptedHTTP2(true)
	a.http = &http.Client{Transport: &http.Transport{Protocols: protocols}}
	defer a.http.CloseIdleConnections()
	resp, err := a.http.Get(a.url + "/health")
	if err != nil || resp.ProtoMajor != 2 || resp.StatusCode != 204 {
		t.Fatalf("got %v, %v", resp, err)
	}
	resp.Body.Close()
	if r := run(t, a.processes(), bash("echo h2")); r.stdout.String() != "h2\n" {
		t.Errorf("got %q", &r.stdout)
	}
}
