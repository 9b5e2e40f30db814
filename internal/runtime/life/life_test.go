package life_test

import (
	"context"
	"errors"
	"os/exec"
	"testing"

	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func openSet(t *testing.T) *life.Set {
	t.Helper()
	set, err := life.OpenSet("7e51")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(set.Close)
	return set
}

func TestAnIDIsClaimedOnce(t *testing.T) {
	set, id := openSet(t), sandbox.NewID()
	if err := set.Claim(id); err != nil {
		t.Fatal(err)
	}
	if err := set.Claim(id); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("the second claim gives %v", err)
	}
	set.Release(id)
	if err := set.Claim(id); err != nil {
		t.Errorf("after the release: %v", err)
	}
}

// TestStop stops an instance whose clean-up fails at first: it is told, and the next
// Stop tries again, and none after that.
func TestStop(t *testing.T) {
	set := openSet(t)
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	engine, err := process.Identify(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = engine.End(context.Background()) })
	failed := errors.New("failed")
	var i *life.Instance
	freed := 0
	i, err = set.Hold(sandbox.NewID(), engine, "its state", func(context.Context) error {
		select {
		case <-i.Done():
		default:
			t.Error("it is freed before its engine has ended")
		}
		if freed++; freed == 1 {
			return failed
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	set.Go(func() {
		defer i.Engine.Close()
		if err := i.Engine.Wait(t.Context()); err != nil {
			return
		}
		if !i.Stopping() {
			t.Error("it ends without being stopped")
		}
		i.Engine.Reap()
		i.End(runtime.Exit{Reason: "stopped"})
	})
	if got := string(i.State()); got != `"its state"` {
		t.Errorf("the state is %s", got)
	}
	if err := i.Stop(t.Context()); !errors.Is(err, failed) {
		t.Errorf("the first stop gives %v", err)
	}
	for range 2 {
		if err := i.Stop(t.Context()); err != nil {
			t.Errorf("a later stop gives %v", err)
		}
	}
	if freed != 2 {
		t.Errorf("freed %d times, want 2", freed)
	}
	if got := i.Exit().Reason; got != "stopped" {
		t.Errorf("it ended by %q", got)
	}
	if _, err := i.Stats(t.Context()); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("its figures give %v", err)
	}
}
