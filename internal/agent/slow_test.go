package agent_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// slow is a runtime whose instances do not answer at first, as a monitor that still writes
// what an agent before asked it for, and that cannot be asked for at first, as on a host
// where too many files are open.
type slow struct {
	runtime.Runtime
	adoptions, answers atomic.Int32 // that fail from now on

	silent atomic.Bool  // no answer comes at all
	asked  atomic.Int32 // how many wait for one
}

func (s *slow) Create(ctx context.Context, cfg runtime.Config) (runtime.Instance, error) {
	i, err := s.Runtime.Create(ctx, cfg)
	return &slowInstance{i, s}, err
}

func (s *slow) Restore(ctx context.Context, cfg runtime.Config, image runtime.Image) (runtime.Instance, error) {
	i, err := s.Runtime.Restore(ctx, cfg, image)
	return &slowInstance{i, s}, err
}

func (s *slow) Adopt(ctx context.Context, id sandbox.ID, state json.RawMessage) (runtime.Instance, error) {
	if s.adoptions.Add(-1) >= 0 {
		return nil, errors.New("adopt sandbox: too many open files")
	}
	i, err := s.Runtime.Adopt(ctx, id, state)
	return &slowInstance{i, s}, err
}

type slowInstance struct {
	runtime.Instance
	of *slow
}

func (i *slowInstance) Resume(ctx context.Context) error {
	if i.of.silent.Load() {
		i.of.asked.Add(1)
		defer i.of.asked.Add(-1)
		<-ctx.Done()
		return ctx.Err()
	}
	if i.of.answers.Add(-1) >= 0 {
		return fmt.Errorf("resume sandbox: %w", context.DeadlineExceeded)
	}
	return i.Instance.Resume(ctx)
}

// Snapshot freezes the instance, and fails.
func (i *slowInstance) Snapshot(ctx context.Context, image runtime.Image, pause bool) error {
	if !ofSandbox(image) {
		return i.Instance.Snapshot(ctx, image, pause)
	}
	return errors.Join(i.Instance.Snapshot(ctx, image, pause), errors.New("the disk is gone"))
}

func TestAnInstanceThatAnswersLateIsNotEnded(t *testing.T) {
	h := newHost(t)
	rt := &slow{Runtime: h.runtime}
	h.runtime = rt
	first, c := h.open(t)
	id, g := sandboxOf(t, c)
	g.write(t, "/root/file", "kept")
	running := func(when string) {
		t.Helper()
		await(t, when, func() bool { return rt.answers.Load() < 0 })
		st := states(t, c)[id]
		if st.GetState() != string(sandbox.Running) || st.GetAddress() == "" {
			t.Fatalf("%s: %v", when, st)
		}
		guestAt{st.GetAddress(), "secret"}.has(t, "/root/file", "kept")
	}
	rt.answers.Store(2)
	if _, err := c.PauseSandbox(t.Context(), &hostagent.PauseSandboxRequest{SandboxId: id}); err == nil {
		t.Fatal("it was paused without an image")
	}
	running("after a pause that failed")
	for _, state := range []sandbox.State{sandbox.Running, sandbox.Pausing} {
		if err := first.Detach(t.Context()); err != nil {
			t.Fatal(err)
		}
		h.changeRecord(t, id, func(r map[string]any) { r["state"] = state })
		rt.adoptions.Store(2)
		rt.answers.Store(2)
		first, c = h.open(t)
		await(t, "it is taken over", func() bool { return states(t, c)[id].GetState() != string(sandbox.Pausing) })
		running(fmt.Sprint("taken over while it was ", state))
	}
	// One that never goes on is asked by one, and killed at once.
	rt.answers.Store(1 << 30)
	for range 4 {
		if _, err := c.PauseSandbox(t.Context(), &hostagent.PauseSandboxRequest{SandboxId: id}); err == nil {
			t.Fatal("it was paused without an image")
		}
	}
	rt.silent.Store(true)
	await(t, "it is asked", func() bool { return rt.asked.Load() > 0 })
	begin := time.Now()
	if _, err := c.StopSandbox(t.Context(), &hostagent.StopSandboxRequest{SandboxId: id}); err != nil {
		t.Error(err)
	}
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("the kill of one that does not answer took %s", took)
	}
	if n := rt.asked.Load(); n != 0 {
		t.Errorf("%d still wait for its answer", n)
	}
	rt.silent.Store(false)
	if err := first.Shutdown(t.Context()); err != nil {
		t.Error(err)
	}
}
