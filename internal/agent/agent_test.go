package agent_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/api/proto/hostagent/hostagentconnect"
	"github.com/wrenn/wrenn/internal/agent"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
	"github.com/wrenn/wrenn/internal/sandbox"
)

const buildID = "test-build"

// host is a machine's worth of directories on which agents come and go.
type host struct {
	dir, tag string
	envd     string
	runtime  runtime.Runtime
	cidr     netip.Prefix // zero: any
	pool     int64        // bytes for the pool

	compressAfter time.Duration
}

func newHost(t *testing.T) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes namespaces and cgroups")
	}
	dir, err := os.MkdirTemp("", "wrenn-agent") // t.TempDir's paths are too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	b := make([]byte, 2)
	rand.Read(b)
	h := &host{dir: dir, tag: hex.EncodeToString(b), envd: filepath.Join(dir, "envd")}
	// Programs of their own, and static: the race detector makes this one need a
	// C library, which there is none of in a sandbox.
	engine := filepath.Join(dir, "runsc-engine")
	for path, pkg := range map[string]string{
		h.envd: "github.com/wrenn/wrenn/cmd/envd",
		engine: "github.com/wrenn/wrenn/internal/runtime/gvisor/runsc/testdata/runsc",
	} {
		build := exec.Command("go", "build", "-ldflags=-s -w", "-o", path, pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v\n%s", pkg, err, out)
		}
	}
	// envd is static: a root filesystem with nothing but accounts is enough.
	for path, text := range map[string]string{
		"etc/passwd": "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/home/user:/bin/sh\n",
		"etc/group":  "root:x:0:\nuser:x:1000:\n",
	} {
		path = filepath.Join(dir, "templates", buildID, "rootfs", path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	h.runtime, err = gvisor.New(gvisor.Config{Binary: engine, Root: filepath.Join(dir, "runsc"), Tag: h.tag, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(network.RemoveAll(context.Background(), h.tag), gvisor.RemoveAll(filepath.Join(dir, "runsc"), h.tag)); err != nil {
			t.Error(err)
		}
	})
	return h
}

// open starts an agent on h and returns a client of it.
func (h *host) open(t *testing.T) (*agent.Agent, hostagentconnect.HostAgentClient) {
	t.Helper()
	a, err := agent.Open(t.Context(), agent.Config{
		Dir: filepath.Join(h.dir, "agent"), Templates: filepath.Join(h.dir, "templates"),
		Runtime: h.runtime, GuestInit: h.envd, Pool: h.pool, CompressAfter: h.compressAfter,
		Network: network.Config{Tag: h.tag, CIDR: h.cidr, Ready: 2, Log: slog.New(slog.DiscardHandler)},
		Log:     slog.New(slog.NewTextHandler(t.Output(), nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle(a.Handler())
	srv := httptest.NewServer(mux)
	t.Cleanup(srv.Close)
	return a, hostagentconnect.NewHostAgentClient(srv.Client(), srv.URL)
}

func create(ctx context.Context, c hostagentconnect.HostAgentClient) (string, error) {
	id := string(sandbox.NewID())
	_, err := c.CreateSandbox(ctx, &hostagent.CreateSandboxRequest{
		SandboxId: id, BuildId: buildID, AccessToken: "secret",
		Resources: &hostagent.Resources{Cpus: 1, MemoryMib: 128, DiskMib: 64, Pids: 1024},
	})
	return id, err
}

// clean fails the test when anything of a sandbox is left on the host.
func (h *host) clean(t *testing.T) {
	t.Helper()
	if left, err := network.Leftovers(h.tag); err != nil || len(left) > 0 {
		t.Errorf("left on the host: %v, %v", left, err)
	}
	if left, err := os.ReadDir(filepath.Join(h.dir, "agent", "sandboxes")); err != nil || len(left) > 0 {
		t.Errorf("left in the agent's directory: %v, %v", left, err)
	}
	for _, dir := range []string{"instances", "images"} {
		if left, err := os.ReadDir(filepath.Join(h.dir, "agent", dir)); err != nil || len(left) > 0 {
			t.Errorf("left in %s: %v, %v", dir, left, err)
		}
	}
	if left, err := filepath.Glob("/sys/fs/cgroup/*/wrenn-" + h.tag + "/*/"); err != nil || len(left) > 0 {
		t.Errorf("cgroups left: %v, %v", left, err)
	}
}

func states(t *testing.T, c hostagentconnect.HostAgentClient) map[string]*hostagent.SandboxStatus {
	t.Helper()
	list, err := c.ListSandboxes(t.Context(), &hostagent.ListSandboxesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m := make(map[string]*hostagent.SandboxStatus)
	for _, s := range list.Sandboxes {
		m[s.SandboxId] = s
	}
	return m
}

func TestASandboxLivesAndDiesLeavingNothing(t *testing.T) {
	h := newHost(t)
	a, c := h.open(t)
	id, err := create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if st := states(t, c)[id]; st.GetState() != string(sandbox.Running) || st.GetAddress() == "" {
		t.Errorf("after create: %v", st)
	}
	_, err = c.CreateSandbox(t.Context(), &hostagent.CreateSandboxRequest{SandboxId: id, BuildId: buildID})
	if connect.CodeOf(err) != connect.CodeAlreadyExists {
		t.Errorf("create with a taken id: %v", err)
	}
	logs, err := c.GetLogs(t.Context(), &hostagent.GetLogsRequest{SandboxId: id})
	if err != nil || len(logs.Entries) == 0 {
		t.Errorf("logs of a running sandbox: %v, %v", logs, err)
	}
	for range 2 {
		if _, err := c.StopSandbox(t.Context(), &hostagent.StopSandboxRequest{SandboxId: id}); err != nil {
			t.Fatal(err)
		}
	}
	if st := states(t, c)[id]; st.GetState() != string(sandbox.Stopped) {
		t.Errorf("after stop: %v", st)
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestARestartedAgentTakesOverWhatRuns(t *testing.T) {
	h := newHost(t)
	first, c := h.open(t)
	kept, err := create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}

	// One that the dead agent had only begun to make.
	halfMade := string(sandbox.NewID())
	dir := filepath.Join(h.dir, "agent", "sandboxes", halfMade)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "record.json"), []byte(`{"id":"`+halfMade+`","state":"starting","slot":77}`), 0o600); err != nil {
		t.Fatal(err)
	}
	// One whose record the host's death tore.
	torn := string(sandbox.NewID())
	if err := os.Mkdir(filepath.Join(h.dir, "agent", "sandboxes", torn), 0o700); err != nil {
		t.Fatal(err)
	}

	second, c := h.open(t)
	got := states(t, c)
	if st := got[kept]; st.GetState() != string(sandbox.Running) {
		t.Errorf("kept sandbox: %v", st)
	}
	for _, id := range []string{halfMade, torn} {
		if st := got[id]; st.GetState() != string(sandbox.Failed) || st.GetReason() == "" {
			t.Errorf("half-made sandbox: %v", st)
		}
	}
	if _, err := c.SetAccessToken(t.Context(), &hostagent.SetAccessTokenRequest{SandboxId: kept, AccessToken: "secret"}); err != nil {
		t.Error(err)
	}
	if logs, err := c.GetLogs(t.Context(), &hostagent.GetLogsRequest{SandboxId: kept}); err != nil || len(logs.Entries) == 0 {
		t.Errorf("logs of an adopted sandbox: %v, %v", logs, err)
	}
	if err := second.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestTheEndOfASandboxByItselfIsAnnounced(t *testing.T) {
	h := newHost(t)
	a, c := h.open(t)
	id, err := create(t.Context(), c)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	ends, err := c.WatchSandboxes(ctx, &hostagent.WatchSandboxesRequest{})
	if err != nil || !ends.Receive() {
		t.Fatalf("watch: %v, %v", err, ends.Err())
	}
	h.killEngine(t, id)
	for ends.Receive() {
		if e := ends.Msg().Ended; e != nil {
			if e.SandboxId != id || e.State != string(sandbox.Failed) || e.Reason == "" {
				t.Errorf("announced %v", e)
			}
			break
		}
	}
	if err := ends.Err(); err != nil {
		t.Error(err)
	}
	cancel()
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestAFailedCreateLeavesNothing(t *testing.T) {
	h := newHost(t)
	a, c := h.open(t)
	for name, tt := range map[string]struct {
		build string
		code  connect.Code
	}{
		"unknown build":       {"no-such-build", connect.CodeNotFound},
		"path in place of id": {"../../etc", connect.CodeInvalidArgument},
	} {
		_, err := c.CreateSandbox(t.Context(), &hostagent.CreateSandboxRequest{SandboxId: string(sandbox.NewID()), BuildId: tt.build})
		if connect.CodeOf(err) != tt.code {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The client goes away while the sandbox is being made.
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := create(ctx, c); err == nil {
		t.Error("a sandbox was made in 30 ms; the test must cancel earlier")
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

// killEngine kills every host process of a sandbox, as the kernel's OOM killer
// or an operator's mistake would.
func (h *host) killEngine(t *testing.T, id string) {
	t.Helper()
	record, err := os.ReadFile(filepath.Join(h.dir, "agent", "sandboxes", id, "record.json"))
	if err != nil {
		t.Fatal(err)
	}
	var r struct{ Instance string }
	if err := json.Unmarshal(record, &r); err != nil {
		t.Fatal(err)
	}
	h.killInstance(t, r.Instance)
}

func (h *host) killInstance(t *testing.T, id string) {
	t.Helper()
	pids, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	killed := 0
	for _, path := range pids {
		cmdline, err := os.ReadFile(path)
		if err != nil || !bytes.Contains(cmdline, []byte(id)) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			t.Fatal(err)
		}
		if p, err := os.FindProcess(pid); err == nil && p.Kill() == nil {
			killed++
		}
	}
	if killed == 0 {
		t.Fatal("no process of the sandbox found")
	}
}
