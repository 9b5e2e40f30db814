package controlplane_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

var errNoRecord = errors.New("the database is gone")

// failingBoxes are a store's sandboxes that cannot be written to now and then.
type failingBoxes struct {
	store.Sandboxes
	fail func(store.Change) error
}

func (b failingBoxes) Transition(ctx context.Context, id sandbox.ID, from sandbox.State, c store.Change) error {
	if err := b.fail(c); err != nil {
		return err
	}
	return b.Sandboxes.Transition(ctx, id, from, c)
}

type failingStore struct {
	store.Store
	fail func(store.Change) error
}

func (s failingStore) Sandboxes() store.Sandboxes { return failingBoxes{s.Store.Sandboxes(), s.fail} }

// failsOnce has the first record of that state fail.
func (r *rig) failsOnce(state sandbox.State) {
	failed := false
	r.store = failingStore{r.store, func(c store.Change) error {
		if c.State != state || failed {
			return nil
		}
		failed = true
		return errNoRecord
	}}
	r.fresh()
}

// None of these run the reconciler: whoever began the move sees it through.

func TestAPauseWhoseRecordFailsIsRecordedAfterAll(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	r.failsOnce(sandbox.Paused)
	is(t, r.Pause(t.Context(), team, b.ID, true), errNoRecord)
	if got := r.record(b.ID); got.State != sandbox.Paused || got.ImageBytes == 0 {
		t.Errorf("record: %+v", got)
	}
	events, err := r.Events(t.Context(), team, b.ID, store.EventFilter{Newest: true, Limit: 1})
	if err != nil || len(events) != 1 || events[0].Cause != "memory and files are kept" {
		t.Errorf("events: %+v, %v", events, err)
	}
	// The move is over.
	if _, resumed, err := r.Connect(t.Context(), team, b.ID, controlplane.ConnectRequest{Timeout: time.Minute}); err != nil || !resumed {
		t.Errorf("connect: %v, %v", resumed, err)
	}
}

func TestAResumeWhoseRecordFailsIsRecordedAfterAll(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	r.pause(b.ID)
	r.failsOnce(sandbox.Running)
	_, _, err := r.Connect(t.Context(), team, b.ID, controlplane.ConnectRequest{Timeout: time.Minute})
	is(t, err, errNoRecord)
	if got := r.record(b.ID); got.State != sandbox.Running || got.ImageBytes != 0 {
		t.Errorf("record: %+v", got)
	}
	if target, err := r.Resolve(t.Context(), string(b.ID)); err != nil || !target.Addr.IsValid() || target.Wake != nil {
		t.Errorf("resolve: %+v, %v", target, err)
	}
	r.pause(b.ID)
}

func TestAMoveThatAKillOvertakesIsNotSettled(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	killed := make(chan error, 1)
	r.store = failingStore{r.store, func(c store.Change) error {
		if c.State == sandbox.Paused { // the agent has paused it, and nobody knows
			go func() { killed <- r.Kill(context.WithoutCancel(t.Context()), team, b.ID) }()
			r.await(b.ID, sandbox.Stopping)
		}
		return nil
	}}
	r.fresh()
	if err := r.Pause(t.Context(), team, b.ID, true); err == nil {
		t.Error("the pause went through")
	}
	if err := <-killed; err != nil {
		t.Error(err)
	}
	if got := r.record(b.ID); got.State != sandbox.Stopped {
		t.Errorf("it is %s", got.State)
	}
	if want, got := "starting running pausing stopping stopped", r.story(b.ID); got != want {
		t.Errorf("events: %s, want %s", got, want)
	}
	r.nothingLives()
}
