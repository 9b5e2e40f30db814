package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// nothingLeft is a condition for eventually.
func nothingLeft(t testing.TB, b *box) func() error {
	return func() error {
		if left := leftoversOf(t, b); len(left) > 0 {
			return errors.New(strings.Join(left, "; "))
		}
		return nil
	}
}

func TestNothingIsLeftOfAKilledSandbox(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	b := p.create(nil)
	b.background("sleep 1000", false)
	if left := leftoversOf(t, b); len(left) < 4 {
		t.Fatalf("a running sandbox has a process, a cgroup and two directories; seen: %v", left)
	}
	b.kill()
	if err := nothingLeft(t, b)(); err != nil {
		t.Errorf("left when kill had answered: %v", err)
	}
	if status, body := p.api("DELETE", "/sandboxes/"+b.id, nil); status != 404 {
		t.Errorf("second kill: %d %s", status, body)
	}
}

func TestNothingIsLeftOfAnExpiredSandbox(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	b := p.create(map[string]any{"timeout": 1})
	b.gone(t, 6*time.Second)
	eventually(t, 5*time.Second, "nothing is left", nothingLeft(t, b))
	if status, body := p.api("GET", "/v2/sandboxes/"+b.id+"/logs", nil); status != 200 && status != 404 {
		t.Errorf("logs of an expired sandbox: %d %s", status, body)
	}
}

func TestFailedCreateLeavesNothing(t *testing.T) {
	t.Parallel()
	t.Run("of an unknown template", func(t *testing.T) {
		p := startPlatform(t)
		status, body := p.api("POST", "/v2/sandboxes", map[string]any{"templateID": "nope"})
		if status != 404 || !strings.Contains(string(body), "nope") {
			t.Errorf("%d %s", status, body)
		}
		failedCreateLeft(t, p)
	})
	t.Run("of a template whose root filesystem is broken", func(t *testing.T) {
		p := newPlatform(t)
		rootfs := t.TempDir()
		// The guest agent is to be mounted below a directory that is none.
		if err := os.WriteFile(filepath.Join(rootfs, "usr"), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		p.adjustBase(rootfs, nil)
		p.start()
		status, body := p.api("POST", "/v2/sandboxes", map[string]any{"templateID": "base"})
		if status < 400 || !json.Valid(body) {
			t.Errorf("%d %s", status, body)
		}
		failedCreateLeft(t, p)
	})
	t.Run("of a template whose root filesystem is missing", func(t *testing.T) {
		p := newPlatform(t)
		rootfs := filepath.Join(t.TempDir(), "rootfs")
		if err := os.Mkdir(rootfs, 0o755); err != nil {
			t.Fatal(err)
		}
		p.adjustBase(rootfs, nil)
		p.start()
		if err := os.Remove(rootfs); err != nil {
			t.Fatal(err)
		}
		status, body := p.api("POST", "/v2/sandboxes", map[string]any{"templateID": "base"})
		if status < 400 || !json.Valid(body) {
			t.Errorf("%d %s", status, body)
		}
		failedCreateLeft(t, p)
	})
}

// failedCreateLeft checks that a platform that has made no sandbox has none.
func failedCreateLeft(t *testing.T, p *platform) {
	t.Helper()
	if ids := p.running(); len(ids) > 0 {
		t.Errorf("listed: %v", ids)
	}
	eventually(t, 5*time.Second, "nothing is left of the sandbox", func() error {
		if dirs := matches("directory", filepath.Join(p.dir, "agent", "sandboxes", "*")); len(dirs) > 0 {
			return fmt.Errorf("left: %v", dirs)
		}
		return nil
	})
}

func TestClientThatGoesAwayDuringCreateLeavesNothingUnowned(t *testing.T) {
	t.Parallel()
	p := startPlatform(t)
	for _, patience := range []time.Duration{time.Millisecond, 20 * time.Millisecond, 60 * time.Millisecond, 120 * time.Millisecond} {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		req, err := http.NewRequestWithContext(ctx, "POST", p.url+"/v2/sandboxes", strings.NewReader(`{"templateID":"base","timeout":20}`))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("X-API-Key", p.key)
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close()
		}
		cancel()
	}
	// Each create is either undone or finished and listed until it expires.
	eventually(t, 40*time.Second, "what is on disk is what is listed, and goes", func() error {
		listed := p.running()
		dirs := matches("", filepath.Join(p.dir, "agent", "sandboxes", "*"))
		if len(dirs)+len(listed) > 0 {
			return fmt.Errorf("listed: %v, on disk: %v", listed, dirs)
		}
		return nil
	})
}

func TestManyCreatesAndKillsLeaveNothing(t *testing.T) {
	p := startPlatform(t)
	const workers, cycles = 8, 40
	warm := p.create(nil) // opens what is opened once
	warm.run("true")
	warm.kill()
	before := openFiles(t, p)
	var next atomic.Int64
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			for n := next.Add(1); n <= cycles && !t.Failed(); n = next.Add(1) {
				if err := cycle(p, n); err != nil {
					t.Errorf("cycle %d: %v", n, err)
				}
			}
		})
	}
	wg.Wait()
	if ids := p.running(); len(ids) > 0 {
		t.Errorf("listed: %v", ids)
	}
	if dirs := matches("", filepath.Join(p.dir, "agent", "sandboxes", "*")); len(dirs) > 0 {
		t.Errorf("directories left: %v", dirs)
	}
	eventually(t, 20*time.Second, "the platform has no more files open than before", func() error {
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		if now := openFiles(t, p); now > before+16 { // slots prepared ahead hold a few
			return fmt.Errorf("%d files open, %d before: %s", now, before, describeFiles(p))
		}
		return nil
	})
	eventually(t, 20*time.Second, "slots are given back", func() error {
		if n := namespacesOf(p.dir); n > 2*(16+workers) {
			return fmt.Errorf("%d network namespaces", n)
		}
		return nil
	})
}

// cycle is one life of a sandbox. It may run beside others, so it returns errors
// and does not end the test.
func cycle(p *platform, n int64) error {
	status, answer, err := p.request("POST", "/v2/sandboxes", map[string]any{"templateID": "base", "timeout": 120})
	if err != nil {
		return err
	}
	var s struct {
		SandboxID       string `json:"sandboxID"`
		EnvdAccessToken string `json:"envdAccessToken"`
	}
	if status != 201 || json.Unmarshal(answer, &s) != nil {
		return fmt.Errorf("create: %d %s", status, answer)
	}
	b := p.box(s.SandboxID, s.EnvdAccessToken)
	r := b.try(fmt.Sprintf("echo cycle %d", n))
	status, answer, err = p.request("DELETE", "/sandboxes/"+b.id, nil)
	switch {
	case err != nil:
		return err
	case r.err != nil || r.stdout != fmt.Sprintf("cycle %d\n", n):
		return fmt.Errorf("command: %s", r)
	case status != 204:
		return fmt.Errorf("kill: %d %s", status, answer)
	}
	return nil
}

func openFiles(t testing.TB, p *platform) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// describeFiles counts a platform's open files by what they are.
func describeFiles(p *platform) string {
	kinds := map[string]int{}
	for _, path := range matches("", fmt.Sprintf("/proc/%d/fd/*", p.cmd.Process.Pid)) {
		target, _ := os.Readlink(strings.TrimSpace(path)) // it may be closed by now
		kind, _, _ := strings.Cut(target, ":[")
		kinds[kind]++
	}
	return fmt.Sprint(kinds)
}
