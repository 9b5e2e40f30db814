package agent_test

import (
	"context"
	goruntime "runtime"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// late is a runtime that is given up on in the middle of a sandbox's image: then it
// still writes it, and does not load it.
type late struct {
	runtime.Runtime
	begun chan struct{} // gets one each time
}

func (l late) Create(ctx context.Context, cfg runtime.Config) (runtime.Instance, error) {
	i, err := l.Runtime.Create(ctx, cfg)
	return lateInstance{i, l}, err
}

func (l late) Restore(ctx context.Context, cfg runtime.Config, image runtime.Image) (runtime.Instance, error) {
	if ofSandbox(image) {
		l.begun <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	i, err := l.Runtime.Restore(ctx, cfg, image)
	return lateInstance{i, l}, err
}

type lateInstance struct {
	runtime.Instance
	late late
}

func (i lateInstance) Snapshot(ctx context.Context, image runtime.Image, pause bool) error {
	if ofSandbox(image) {
		i.late.begun <- struct{}{}
		<-ctx.Done()
		ctx = context.WithoutCancel(ctx)
	}
	return i.Instance.Snapshot(ctx, image, pause)
}

// ofSandbox tells images of paused sandboxes from those of templates.
func ofSandbox(image runtime.Image) bool { return strings.Contains(image.Dir, "/sandboxes/") }

func TestAShutdownKeepsWhatIsPausedOrResumedInTheLastMoment(t *testing.T) {
	h := newHost(t)
	plain := h.runtime
	// stillPaused is how the agent that was shut down should have left it.
	stillPaused := func(id string) {
		t.Helper()
		if left := h.instances(t); len(left) > 0 {
			t.Errorf("instances are left: %v", left)
		}
		h.runtime = plain
		next, c := h.open(t)
		if st := states(t, c)[id]; st.GetState() != string(sandbox.Paused) {
			t.Fatalf("the next agent has %v", st)
		}
		g, _ := resumeSandbox(t, c, id, false)
		g.has(t, "/root/file", "kept")
		pauseSandbox(t, c, id, false)
		if err := next.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
	}

	l := late{plain, make(chan struct{}, 1)}
	h.runtime = l
	a, c := h.open(t)
	id, g := sandboxOf(t, c)
	g.write(t, "/root/file", "kept")
	paused, resumed := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := c.PauseSandbox(t.Context(), &hostagent.PauseSandboxRequest{SandboxId: id})
		paused <- err
	}()
	<-l.begun
	resume := func() {
		_, err := c.ResumeSandbox(t.Context(), &hostagent.ResumeSandboxRequest{SandboxId: id, AccessToken: "secret"})
		resumed <- err
	}
	go resume()
	await(t, "the resume waits for the pause", func() bool {
		stacks := make([]byte, 4<<20)
		return strings.Contains(string(stacks[:goruntime.Stack(stacks, true)]), "agent.(*Agent).transition(")
	})
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-paused; err != nil {
		t.Errorf("pause: %v", err)
	}
	if err := <-resumed; connect.CodeOf(err) != connect.CodeUnavailable {
		t.Errorf("resume: %v", err)
	}
	stillPaused(id)

	h.runtime = l
	a, c = h.open(t)
	go resume()
	<-l.begun
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-resumed; err == nil {
		t.Error("the resume went through")
	}
	stillPaused(id)

	h.runtime = plain
	a, c = h.open(t)
	if _, err := c.StopSandbox(t.Context(), &hostagent.StopSandboxRequest{SandboxId: id}); err != nil {
		t.Error(err)
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}

func TestTheReasonOfAnEndIsKnownToTheAgentsThatFollow(t *testing.T) {
	h := newHost(t)
	a, c := h.open(t)
	id, _ := sandboxOf(t, c)
	if err := a.Detach(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.killEngine(t, id)
	h.changeRecord(t, id, func(r map[string]any) { // killed before anything was freed
		r["state"], r["end"], r["reason"] = "stopping", string(sandbox.Failed), "it had too much"
	})
	for _, next := range []string{"that frees it", "after that"} {
		a, c = h.open(t)
		if st := states(t, c)[id]; st.GetState() != string(sandbox.Failed) || st.GetReason() != "it had too much" {
			t.Errorf("the agent %s has %v", next, st)
		}
		if err := a.Shutdown(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	h.clean(t)
}
