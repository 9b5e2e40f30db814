package runtimetest

// How instances begin and end: stop, exit, kill, conflict, failure, adoption.

import (
	"context"
	"encoding/json"
	"errors"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func testStop(t *testing.T, s *suite) {
	g := s.start(t)
	start := time.Now()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if err := g.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Log("stop took", time.Since(start))
	select {
	case <-g.Done():
	default:
		t.Error("stopped, but not done")
	}
	s.checkNothingLeft(t, g.cfg)
	if err := g.Stop(t.Context()); err != nil {
		t.Error("third stop:", err)
	}
	if _, err := g.Stats(t.Context()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("stats of a stopped instance: %v", err)
	}
}

// Whose an instance is may be said at any time; whether its guest can ask, each runtime
// sees for itself.
func testIdentify(t *testing.T, s *suite) {
	g := s.start(t)
	for _, id := range []string{"one", "two", ""} {
		if err := g.Identify(t.Context(), id, "base"); err != nil {
			t.Errorf("identify as %q: %v", id, err)
		}
	}
	if _, err := g.call(t.Context(), "GET", "/ping", nil, ""); err != nil {
		t.Error("afterwards:", err)
	}
}

func testInitExit(t *testing.T, s *suite) {
	g := s.start(t)
	g.call(t.Context(), "POST", "/exit", url.Values{"code": {"7"}}, "")
	exit := awaitEnd(t, g, 10*time.Second)
	if exit.OutOfMemory || !strings.Contains(exit.Reason, "status 7") {
		t.Errorf("exit is %+v", exit)
	}
}

func testEngineKilled(t *testing.T, s *suite) {
	g := s.start(t)
	s.KillEngine(t, g)
	if exit := awaitEnd(t, g, 10*time.Second); exit.OutOfMemory || !strings.Contains(exit.Reason, "signal 9") {
		t.Errorf("exit is %+v", exit)
	}
}

func testConflict(t *testing.T, s *suite) {
	g := s.start(t)
	cfg := s.config(t)
	cfg.ID = g.cfg.ID
	for name, rt := range map[string]runtime.Runtime{"the same runtime": s.Runtime, "a second runtime": s.Reopen(t)} {
		if _, err := rt.Create(t.Context(), cfg); !errors.Is(err, sandbox.ErrConflict) {
			t.Errorf("%s: second create gives %v", name, err)
		}
	}
	g.must(t, "GET", "/ping", nil, "")
}

func testCreateFails(t *testing.T, s *suite) {
	for name, change := range map[string]func(*runtime.Config){
		"no root filesystem":  func(c *runtime.Config) { c.RootFS = "/nonexistent" },
		"no guest agent":      func(c *runtime.Config) { c.GuestInit = "/nonexistent" },
		"init is no program":  func(c *runtime.Config) { c.GuestInit = "/etc/passwd" },
		"no network":          func(c *runtime.Config) { c.Slot = &network.Slot{InnerNetNS: "/nonexistent", TAP: "tap0"} },
		"no memory":           func(c *runtime.Config) { c.Resources.MemoryMiB = 0 },
		"negative processors": func(c *runtime.Config) { c.Resources.CPUs = -1 },
		"no directory":        func(c *runtime.Config) { c.Dir = filepath.Join(c.Dir, "missing") },
		"a bad id":            func(c *runtime.Config) { c.ID = "../../etc" },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := s.config(t)
			bad := cfg
			change(&bad)
			if inst, err := s.Runtime.Create(t.Context(), bad); err == nil {
				t.Error("create succeeded")
				inst.Stop(t.Context())
			} else {
				t.Log(err)
			}
			s.checkNothingLeft(t, cfg)
		})
	}
}

func testCreateCancelled(t *testing.T, s *suite) {
	s.cancelled(t, s.Runtime.Create, 0, 5, 15, 30, 45, 60, 75, 90, 110)
}

// cancelled starts instances and breaks that off after so many milliseconds: nothing
// may be left.
func (s *suite) cancelled(t *testing.T, start func(context.Context, runtime.Config) (runtime.Instance, error), after ...int) {
	t.Helper()
	for _, ms := range after {
		cfg := s.config(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(ms)*time.Millisecond)
		inst, err := start(ctx, cfg)
		cancel()
		switch {
		case err == nil: // it was faster
			if err := inst.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		case !errors.Is(err, context.DeadlineExceeded):
			t.Errorf("cancelled after %d ms: %v", ms, err)
		}
		s.checkNothingLeft(t, cfg)
	}
}

func testAdopt(t *testing.T, s *suite) {
	g := s.start(t)
	second := s.Reopen(t)
	inst, err := second.Adopt(t.Context(), g.cfg.ID, g.State())
	if err != nil {
		t.Fatal(err)
	}
	if string(inst.State()) != string(g.State()) {
		t.Errorf("state changed from %s to %s", g.State(), inst.State())
	}
	select {
	case <-inst.Done():
		t.Fatalf("adopted instance is done: %+v", inst.Exit())
	default:
	}
	if _, err := inst.Stats(t.Context()); err != nil {
		t.Error(err)
	}
	g.call(t.Context(), "POST", "/exit", url.Values{"code": {"3"}}, "")
	for name, i := range map[string]runtime.Instance{"creator": g, "adopter": inst} {
		if exit := awaitEnd(t, i, 10*time.Second); !strings.Contains(exit.Reason, "status 3") {
			t.Errorf("%s: exit is %+v", name, exit)
		}
	}
	if err := inst.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	s.checkNothingLeft(t, g.cfg)
}

func testAdoptEnded(t *testing.T, s *suite) {
	g := s.start(t)
	s.KillEngine(t, g)
	awaitEnd(t, g, 10*time.Second)
	second := s.Reopen(t)
	if _, err := second.Adopt(t.Context(), g.cfg.ID, g.State()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("adopting what has ended gives %v", err)
	}
	for range 2 {
		if err := second.Discard(t.Context(), g.cfg.ID, g.State()); err != nil {
			t.Error(err)
		}
		s.checkNothingLeft(t, g.cfg)
	}
}

func testDiscard(t *testing.T, s *suite) {
	if err := s.Runtime.Discard(t.Context(), sandbox.NewID(), nil); err != nil {
		t.Errorf("discarding what never was: %v", err)
	}
	for name, state := range map[string]json.RawMessage{"no state": nil, "broken state": json.RawMessage("{")} {
		g := s.start(t)
		if err := s.Reopen(t).Discard(t.Context(), g.cfg.ID, state); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		for _, left := range s.Leftovers(t, g.cfg.ID) {
			t.Errorf("%s: left on the host: %s", name, left)
		}
		awaitEnd(t, g, 10*time.Second)
	}
}

func testConcurrent(t *testing.T, s *suite) {
	cfgs := make([]runtime.Config, 8)
	for i := range cfgs {
		cfgs[i] = s.config(t)
	}
	var wg sync.WaitGroup
	for _, cfg := range cfgs {
		wg.Go(func() {
			inst, err := s.Runtime.Create(t.Context(), cfg)
			if err != nil {
				t.Error(err)
				return
			}
			if err := inst.Stop(t.Context()); err != nil {
				t.Error(err)
			}
			s.checkNothingLeft(t, cfg)
		})
	}
	wg.Wait()
}
