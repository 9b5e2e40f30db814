package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/client"
)

// halves is a platform of two processes, `wrenn agent` and `wrenn server`, that are
// killed and started again while it is used.
type halves struct {
	t      testing.TB
	dir    string
	listen string
	key    string
	client *client.Client

	mu        sync.Mutex
	processes map[string]*exec.Cmd
	disturbed time.Time // when the last of what was killed was there again
	boxes     map[string]*chaosBox
	slowest   time.Duration // until the end of a killed engine was told, of a platform that was whole

	watchers sync.WaitGroup
}

func newHalves(t *testing.T) *halves {
	t.Helper()
	p := newPlatform(t)
	h := &halves{
		t: t, dir: p.dir, listen: p.listen,
		processes: make(map[string]*exec.Cmd), boxes: make(map[string]*chaosBox),
	}
	t.Cleanup(func() {
		for _, name := range []string{"server", "agent"} {
			h.end(name, syscall.SIGTERM)
		}
		for _, name := range []string{"server", "agent"} {
			if t.Failed() {
				text, _ := os.ReadFile(h.logFile(name))
				t.Logf("log of the %s:\n%s", name, text[max(0, len(text)-20_000):])
			}
			os.Remove(h.logFile(name))
		}
	})
	h.start("agent")
	h.start("server")
	var creds client.Credentials
	eventually(t, 20*time.Second, "the server has written its credentials", func() (err error) {
		creds, err = client.LoadCredentials(filepath.Join(h.dir, "credentials.json"))
		return err
	})
	h.key = creds.APIKey
	var err error
	h.client, err = client.New(client.Config{APIURL: creds.APIURL, SandboxURL: creds.SandboxURL, APIKey: creds.APIKey})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(h.client.Close)
	return h
}

func (h *halves) logFile(name string) string { return h.dir + "." + name + ".log" }

// start runs one half and waits until it serves.
func (h *halves) start(name string) {
	log, err := os.OpenFile(h.logFile(name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		h.t.Error(err)
		return
	}
	defer log.Close()
	args := map[string][]string{
		"agent":  {"agent", "--data", h.dir, "--pool-memory", "96", "--ready-slots", "4"},
		"server": {"server", "--data", h.dir, "--listen", h.listen},
	}[name]
	cmd := exec.Command(suite.bin, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		h.t.Error(err)
		return
	}
	h.mu.Lock()
	h.processes[name] = cmd
	h.mu.Unlock()
	serves := func() bool {
		network, address := "tcp", h.listen
		if name == "agent" {
			network, address = "unix", filepath.Join(h.dir, "agent", "agent.sock")
		}
		conn, err := net.Dial(network, address)
		if err == nil {
			conn.Close()
		}
		return err == nil
	}
	for began := time.Now(); !serves(); time.Sleep(10 * time.Millisecond) {
		if time.Since(began) > time.Minute {
			h.t.Errorf("the %s does not come up", name)
			return
		}
	}
	h.disturb()
}

func (h *halves) end(name string, sig syscall.Signal) {
	h.mu.Lock()
	cmd := h.processes[name]
	delete(h.processes, name)
	h.mu.Unlock()
	if cmd == nil {
		return
	}
	_ = cmd.Process.Signal(sig)
	_ = cmd.Wait() // says how it was ended
}

func (h *halves) disturb() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.disturbed = time.Now()
}

// calm is how long nothing has been killed.
func (h *halves) calm() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.processes) < 2 {
		return 0
	}
	return time.Since(h.disturbed)
}

// kills is what the killer has done.
type kills struct{ agent, server, engine int }

// kill kills and restarts at random moments, n times. What it draws from rng does
// not depend on what happens.
func (h *halves) kill(ctx context.Context, rng *rand.Rand, n int) (done kills) {
	for done.agent+done.server+done.engine < n && ctx.Err() == nil {
		pause, kind, which := time.Duration(100+rng.IntN(2500))*time.Millisecond, rng.IntN(10), rng.IntN(1<<30)
		select {
		case <-ctx.Done():
			return done
		case <-time.After(pause):
		}
		switch {
		case kind < 4:
			h.end("agent", syscall.SIGKILL)
			h.start("agent")
			done.agent++
		case kind < 7:
			h.end("server", syscall.SIGKILL)
			h.start("server")
			done.server++
		default:
			if h.killEngine(which) {
				done.engine++
			}
		}
	}
	return done
}

// killEngine kills the sandbox kernel of one of the sandboxes that run.
func (h *halves) killEngine(which int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	ids := make([]string, 0, len(h.boxes))
	for id := range h.boxes {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	for i := range ids {
		b := h.boxes[ids[(which+i)%len(ids)]]
		pid := h.engineOf(b.id)
		if pid == 0 {
			continue
		}
		b.killed = time.Now()
		if syscall.Kill(pid, syscall.SIGKILL) == nil {
			h.disturbed = time.Now()
			h.watchers.Go(func() { h.mustTell(b.id, pid) })
			return true
		}
	}
	return false
}

// engineOf is the process that a sandbox runs in by the agent's journal, 0 for none.
func (h *halves) engineOf(id string) int {
	data, err := os.ReadFile(filepath.Join(h.dir, "agent", "sandboxes", id, "record.json"))
	var record struct {
		RuntimeState struct{ Engine struct{ PID int } } `json:"runtime_state"`
	}
	if err != nil || json.Unmarshal(data, &record) != nil || record.RuntimeState.Engine.PID < 2 {
		return 0
	}
	return record.RuntimeState.Engine.PID
}

// truthLimit is how long a platform that is whole may take to tell the truth.
const truthLimit = 5 * time.Second

// mustTell looks whether the end of the engine with that pid is told in time: the
// sandbox is gone then, or paused, or runs in another.
func (h *halves) mustTell(id string, pid int) {
	for began := time.Now(); h.t.Context().Err() == nil; time.Sleep(50 * time.Millisecond) {
		took := min(time.Since(began), h.calm())
		ctx, cancel := context.WithTimeout(h.t.Context(), truthLimit)
		info, err := h.client.Get(ctx, id)
		cancel()
		switch {
		case err != nil && passing(err):
		case err != nil || info.State != "running" || h.engineOf(id) != pid:
			h.mu.Lock()
			h.slowest = max(h.slowest, took)
			h.mu.Unlock()
			return
		}
		if took > truthLimit {
			h.t.Errorf("sandbox %s: %v after its engine was killed it is told as %q, %v", id, took, info.State, err)
			return
		}
	}
}

// killedAt is when a sandbox's engine was killed; zero if it was not.
func (h *halves) killedAt(b *chaosBox) time.Time {
	h.mu.Lock()
	defer h.mu.Unlock()
	return b.killed
}

// passing reports whether an error is what a platform may say of which a part was
// killed a moment ago.
func passing(err error) bool {
	var api *client.APIError
	if errors.As(err, &api) {
		return api.Status == 503 || api.Status == 502 || api.Status == 409
	}
	var gone *client.GoneError
	return !errors.As(err, &gone)
}

// insist calls f until it succeeds. An error that is not of a part that was killed
// a moment ago fails the test, and so does one that goes on for long in a platform
// that is whole.
func (h *halves) insist(what string, f func(ctx context.Context) error) error {
	const patience = 20 * time.Second // the machine is busy
	for began := time.Now(); ; time.Sleep(50 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
		err := f(ctx)
		cancel()
		if err == nil || !passing(err) || h.t.Context().Err() != nil {
			return err
		}
		if calm := h.calm(); calm > patience && time.Since(began) > patience {
			return fmt.Errorf("%s: still, %v after the last kill: %w", what, calm, err)
		}
	}
}
