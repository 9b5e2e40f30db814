package controlplane_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

func (r *rig) pause(id sandbox.ID) {
	r.t.Helper()
	if err := r.Pause(r.t.Context(), team, id, true); err != nil {
		r.t.Fatal(err)
	}
}

// story is what happened to a sandbox: its states, one after the other.
func (r *rig) story(id sandbox.ID) string {
	r.t.Helper()
	events, err := r.Events(r.t.Context(), team, id, store.EventFilter{})
	if err != nil {
		r.t.Fatal(err)
	}
	var states []string
	for _, e := range events {
		if e.Cause == "" {
			r.t.Errorf("event without a cause: %+v", e)
		}
		states = append(states, string(e.State))
	}
	return strings.Join(states, " ")
}

func TestAPausedSandboxIsUnreachableUntilItIsResumed(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	r.pause(b.ID)
	if got := r.record(b.ID); got.State != sandbox.Paused || !got.MemoryKept || got.ImageBytes == 0 {
		t.Errorf("record: %+v", got)
	}
	if id := <-r.gone; id != string(b.ID) {
		t.Errorf("told that %s is gone", id)
	}
	_, err := r.Resolve(t.Context(), string(b.ID))
	is(t, err, sandbox.ErrNotFound)
	is(t, r.Pause(t.Context(), team, b.ID, true), sandbox.ErrConflict)
	is(t, r.SetTimeout(t.Context(), team, b.ID, time.Hour), sandbox.ErrConflict)
	is(t, r.Pause(t.Context(), "other", b.ID, true), sandbox.ErrNotFound)
	_, _, err = r.Connect(t.Context(), "other", b.ID, controlplane.ConnectRequest{Timeout: time.Hour})
	is(t, err, sandbox.ErrNotFound)

	got, resumed, err := r.Connect(t.Context(), team, b.ID, controlplane.ConnectRequest{Timeout: time.Hour})
	if err != nil || !resumed || got.State != sandbox.Running || time.Until(got.Ends) < 59*time.Minute {
		t.Errorf("connect: %+v, %v, %v", got, resumed, err)
	}
	if target, err := r.Resolve(t.Context(), string(b.ID)); err != nil || !target.Addr.IsValid() || target.Wake != nil {
		t.Errorf("resolve: %+v, %v", target, err)
	}
	_, err = r.Resume(t.Context(), team, b.ID, controlplane.ResumeRequest{Timeout: time.Hour})
	is(t, err, sandbox.ErrConflict)
	if want, got := "starting running pausing paused resuming running", r.story(b.ID); got != want {
		t.Errorf("events: %s, want %s", got, want)
	}
}

func TestAHundredRequestsWakeASandboxOnce(t *testing.T) {
	r := newRig(t)
	b, err := r.Create(t.Context(), team, controlplane.CreateRequest{
		Template: "base", Timeout: time.Minute, Secured: true, AutoPause: true, AutoPauseMemory: true, AutoResume: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	proceed := make(chan struct{})
	r.agent.OnPause = func(context.Context, string) error { <-proceed; return nil }
	paused := make(chan error, 1)
	go func() { paused <- r.Pause(t.Context(), team, b.ID, true) }()
	r.await(b.ID, sandbox.Pausing)
	var wg sync.WaitGroup
	for i := range 100 { // they come while it is being paused
		wg.Go(func() {
			target, err := r.Resolve(t.Context(), string(b.ID))
			if err == nil && target.Wake != nil { // who comes late finds it awake
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if i == 0 {
					cancel() // who comes first may go again
				}
				target, err = target.Wake(ctx)
			}
			if i > 0 && (err != nil || !target.Addr.IsValid()) {
				t.Errorf("woken: %+v, %v", target, err)
			}
		})
	}
	close(proceed)
	if err := <-paused; err != nil {
		t.Fatal(err)
	}
	wg.Wait()
	if n := r.agent.Resumes(b.ID); n != 1 {
		t.Errorf("resumed %d times", n)
	}
	if got := r.record(b.ID); got.State != sandbox.Running || time.Until(got.Ends) < 50*time.Second {
		t.Errorf("record: %+v", got)
	}
}

func TestTrafficWakesOnlyWhatMayBeWoken(t *testing.T) {
	r := newRig(t)
	for name, c := range map[string]struct{ autoResume, memory, wakes bool }{
		"not asked for":   {false, true, false},
		"files only":      {true, false, false},
		"with its memory": {true, true, true},
	} {
		b, err := r.Create(t.Context(), team, controlplane.CreateRequest{
			Template: "base", Timeout: time.Minute, AutoPause: true, AutoPauseMemory: true, AutoResume: c.autoResume,
		})
		if err != nil {
			t.Fatal(err)
		}
		if err := r.Pause(t.Context(), team, b.ID, c.memory); err != nil {
			t.Fatal(err)
		}
		for _, when := range []string{"at once", "after a restart"} {
			target, err := r.Resolve(t.Context(), string(b.ID))
			if got := err == nil && target.Wake != nil; got != c.wakes {
				t.Errorf("%s, %s: %+v, %v", name, when, target, err)
			}
			r.fresh()
		}
	}
}

func TestAtTheEndOfItsTimeASandboxIsPausedIfThatWasAskedFor(t *testing.T) {
	r := newRig(t).run()
	for _, memory := range []bool{true, false} {
		b, err := r.Create(t.Context(), team, controlplane.CreateRequest{
			Template: "base", Timeout: 20 * time.Millisecond, AutoPause: true, AutoPauseMemory: memory,
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := r.await(b.ID, sandbox.Paused); got.MemoryKept != memory {
			t.Errorf("memory kept: %v, want %v", got.MemoryKept, memory)
		}
		events, err := r.Events(t.Context(), team, b.ID, store.EventFilter{})
		if err != nil || !slices.ContainsFunc(events, func(e sandbox.Event) bool {
			return e.State == sandbox.Pausing && strings.Contains(e.Cause, "timeout")
		}) {
			t.Errorf("events: %+v, %v", events, err)
		}
	}
}

func TestASandboxThatCannotBePausedAtTheEndOfItsTimeIsNotKilled(t *testing.T) {
	r := newRig(t)
	tried := make(chan struct{}, 1)
	r.agent.OnPause = func(context.Context, string) error {
		tried <- struct{}{}
		return connect.NewError(connect.CodeResourceExhausted, errors.New("the host's disk is full"))
	}
	r.run()
	b, err := r.Create(t.Context(), team, controlplane.CreateRequest{
		Template: "base", Timeout: 20 * time.Millisecond, AutoPause: true, AutoPauseMemory: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	<-tried
	got := r.await(b.ID, sandbox.Running)
	if d := time.Until(got.Ends); d < 30*time.Second {
		t.Errorf("it is tried again in %v", d)
	}
	if target, err := r.Resolve(t.Context(), string(b.ID)); err != nil || target.Wake != nil {
		t.Errorf("resolve: %+v, %v", target, err)
	}
	events, err := r.Events(t.Context(), team, b.ID, store.EventFilter{Newest: true, Limit: 1})
	if err != nil || len(events) != 1 || !strings.Contains(events[0].Cause, "disk is full") {
		t.Errorf("events: %+v, %v", events, err)
	}
}

func TestAFailedResumeLeavesItPaused(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	r.pause(b.ID)
	r.agent.OnResume = func(context.Context, string) error {
		return connect.NewError(connect.CodeAlreadyExists, errors.New("the image is damaged"))
	}
	_, _, err := r.Connect(t.Context(), team, b.ID, controlplane.ConnectRequest{Timeout: time.Minute})
	is(t, err, sandbox.ErrConflict)
	if err == nil || err.Error() != "the image is damaged" {
		t.Errorf("connect: %v", err)
	}
	if got := r.record(b.ID); got.State != sandbox.Paused {
		t.Errorf("it is %s", got.State)
	}
	for range 2 {
		if err := ignoreGone(r.Kill(t.Context(), team, b.ID)); err != nil {
			t.Error(err)
		}
	}
	r.nothingLives()
}

func ignoreGone(err error) error {
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}

func TestAKillWinsOverWhateverIsUnderWay(t *testing.T) {
	r := newRig(t)
	for name, c := range map[string]struct {
		hook  *func(context.Context, string) error
		state sandbox.State
		begin func(id sandbox.ID) error
	}{
		"a pause": {&r.agent.OnPause, sandbox.Pausing, func(id sandbox.ID) error { return r.Pause(t.Context(), team, id, true) }},
		"a resume": {&r.agent.OnResume, sandbox.Resuming, func(id sandbox.ID) error {
			_, _, err := r.Connect(t.Context(), team, id, controlplane.ConnectRequest{Timeout: time.Minute})
			return err
		}},
	} {
		b := r.create(time.Minute)
		if c.state == sandbox.Resuming {
			r.pause(b.ID)
		}
		*c.hook = func(ctx context.Context, _ string) error { <-ctx.Done(); return ctx.Err() }
		done := make(chan error, 1)
		go func() { done <- c.begin(b.ID) }()
		r.await(b.ID, c.state)
		if err := r.Kill(t.Context(), team, b.ID); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := <-done; err == nil {
			t.Errorf("%s went through", name)
		}
		*c.hook = nil
		if got := r.record(b.ID); got.State != sandbox.Stopped {
			t.Errorf("%s: it is %s", name, got.State)
		}
		r.nothingLives()
	}
}

func TestWhatACrashLeftInTransitionIsSettledByWhatTheAgentHas(t *testing.T) {
	r := newRig(t)
	type crash struct{ record, agent, want sandbox.State }
	cases := map[sandbox.ID]crash{}
	for _, c := range []crash{
		{sandbox.Pausing, sandbox.Running, sandbox.Running},
		{sandbox.Pausing, sandbox.Paused, sandbox.Paused},
		{sandbox.Pausing, "", sandbox.Failed},
		{sandbox.Pausing, sandbox.Failed, sandbox.Failed},
		{sandbox.Resuming, sandbox.Running, sandbox.Running},
		{sandbox.Resuming, sandbox.Paused, sandbox.Paused},
		{sandbox.Resuming, sandbox.Failed, sandbox.Failed},
		{sandbox.Paused, sandbox.Paused, sandbox.Paused},
		{sandbox.Paused, "", sandbox.Failed},
	} {
		b := r.create(time.Hour)
		path := map[sandbox.State][]sandbox.State{
			sandbox.Pausing:  {sandbox.Pausing},
			sandbox.Paused:   {sandbox.Pausing, sandbox.Paused},
			sandbox.Resuming: {sandbox.Pausing, sandbox.Paused, sandbox.Resuming},
		}[c.record]
		from := sandbox.Running
		for _, to := range path {
			if err := r.store.Sandboxes().Transition(t.Context(), b.ID, from, store.Change{State: to}); err != nil {
				t.Fatal(err)
			}
			from = to
		}
		if c.agent == "" {
			r.agent.Vanish(b.ID)
		} else {
			r.agent.Put(b.ID, c.agent, "engine died")
		}
		cases[b.ID] = c
	}
	r.fresh()
	r.run()
	for id, c := range cases {
		got := r.await(id, c.want)
		if c.want == sandbox.Failed && got.Reason == "" {
			t.Errorf("%+v: no reason", c)
		}
		if c.record == sandbox.Pausing && c.want == sandbox.Paused && got.ImageBytes == 0 {
			t.Errorf("%+v: its image counts for nothing", c)
		}
		if target, err := r.Resolve(t.Context(), string(id)); (err == nil && target.Addr.IsValid()) != (c.want == sandbox.Running) {
			t.Errorf("%+v: resolves to %+v, %v", c, target, err)
		}
	}
}

func TestAPauseWhoseAnswerIsLostIsSettledWhenTheAgentIsBack(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	r.agent.OnPause = func(context.Context, string) error {
		r.agent.SetDown(true)
		return connect.NewError(connect.CodeUnavailable, errors.New("killed"))
	}
	done := make(chan error, 1)
	go func() { done <- r.Pause(t.Context(), team, b.ID, true) }()
	r.await(b.ID, sandbox.Pausing)
	_, err := r.Snapshot(contextFor(t, 50*time.Millisecond), team, b.ID, "") // it waits
	is(t, err, context.DeadlineExceeded)
	r.agent.SetDown(false)
	is(t, <-done, sandbox.ErrUnavailable)
	if got := r.record(b.ID); got.State != sandbox.Running {
		t.Errorf("it is %s", got.State)
	}
}

func contextFor(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

func TestSnapshotsAreTemplates(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Hour)
	s, err := r.Snapshot(t.Context(), team, b.ID, "mine")
	if err != nil || s.Name != "mine" || s.SizeBytes == 0 {
		t.Fatalf("snapshot: %+v, %v", s, err)
	}
	if _, err := r.Snapshot(t.Context(), team, b.ID, "base"); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("a snapshot named like a template: %v", err)
	}
	second, err := r.Snapshot(t.Context(), team, b.ID, "mine")
	if err != nil {
		t.Fatal(err)
	}
	for ref, image := range map[string]string{s.ID: s.ID, "mine": second.ID, "mine:default": second.ID, "default/mine": second.ID} {
		child, err := r.Create(t.Context(), team, controlplane.CreateRequest{Template: ref, Timeout: time.Minute, Secured: true})
		if err != nil {
			t.Errorf("%s: %v", ref, err)
			continue
		}
		req := r.agent.Created(child.ID)
		if req.GetImageId() != image || req.GetImageAccessToken() != r.AccessToken(b.ID) || req.GetAccessToken() != r.AccessToken(child.ID) || req.GetDefaultUser() != "user" {
			t.Errorf("%s: the agent was asked for %v", ref, req)
		}
	}
	_, err = r.Create(t.Context(), team, controlplane.CreateRequest{
		Template: s.ID, Timeout: time.Minute, Resources: sandbox.Resources{MemoryMiB: 4096},
	})
	is(t, err, sandbox.ErrInvalid)
	is(t, r.DeleteSnapshot(t.Context(), "other", s.ID), sandbox.ErrNotFound)
	if err := r.DeleteSnapshot(t.Context(), team, s.ID); err != nil {
		t.Error(err)
	}
	is(t, r.DeleteSnapshot(t.Context(), team, s.ID), sandbox.ErrNotFound)
	if images := r.agent.Images(); !slices.Equal(images, []string{second.ID}) {
		t.Errorf("images: %v", images)
	}
	r.agent.OnSnapshot = func(context.Context, string) error { return connect.NewError(connect.CodeInternal, errors.New("oh")) }
	if _, err := r.Snapshot(t.Context(), team, b.ID, "mine"); err == nil {
		t.Error("a failed snapshot is none")
	}
	if list, err := r.store.Snapshots().List(t.Context(), store.SnapshotFilter{}); err != nil || len(list) != 1 {
		t.Errorf("records: %+v, %v", list, err)
	}
}

func TestForksAreManyAndTheirImageIsNobodys(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Hour)
	n := 0
	var mu sync.Mutex
	r.agent.OnCreate = func(_ context.Context, req *hostagent.CreateSandboxRequest) error {
		mu.Lock()
		defer mu.Unlock()
		if n++; n%3 == 0 {
			return connect.NewError(connect.CodeResourceExhausted, errors.New("full"))
		}
		return nil
	}
	forks, err := r.Fork(t.Context(), team, b.ID, 9, time.Minute)
	if err != nil || len(forks) != 9 {
		t.Fatalf("%d forks, %v", len(forks), err)
	}
	made := 0
	for _, f := range forks {
		if f.Err != nil {
			is(t, f.Err, sandbox.ErrUnavailable)
			continue
		}
		made++
		if got := r.record(f.Sandbox.ID); got.SourceID != b.ID || got.State != sandbox.Running || got.ID == b.ID || time.Until(got.Ends) > time.Minute {
			t.Errorf("fork: %+v", got)
		}
	}
	if made != 6 {
		t.Errorf("%d forks were made", made)
	}
	if images := r.agent.Images(); len(images) != 0 {
		t.Errorf("images: %v", images)
	}
	if got := r.record(b.ID); got.State != sandbox.Running || time.Until(got.Ends) < 59*time.Minute {
		t.Errorf("source: %+v", got)
	}
	for _, count := range []int{0, -1, 101} {
		_, err := r.Fork(t.Context(), team, b.ID, count, time.Minute)
		is(t, err, sandbox.ErrInvalid)
	}
	_, err = r.Fork(t.Context(), "other", b.ID, 1, time.Minute)
	is(t, err, sandbox.ErrNotFound)
}

func TestImagesThatNoSnapshotRefersToAreCollected(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Hour)
	kept, err := r.Snapshot(t.Context(), team, b.ID, "")
	if err != nil {
		t.Fatal(err)
	}
	old := time.Now().Add(-time.Hour)
	for _, state := range []store.SnapshotState{store.SnapshotCreating, store.SnapshotDeleting} {
		s := kept
		s.ID, s.State, s.Created = string(sandbox.NewID()), state, old
		if err := r.store.Snapshots().Insert(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		r.agent.PutImage(s.ID, old)
	}
	young := string(sandbox.NewID())
	r.agent.PutImage(string(sandbox.NewID()), old)
	r.agent.PutImage(young, time.Now())
	r.fresh()
	r.run()
	want := []string{kept.ID, young}
	slices.Sort(want)
	for end := time.Now().Add(patience); !slices.Equal(r.agent.Images(), want); <-time.After(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("images: %v, want %v", r.agent.Images(), want)
		}
	}
	if list, err := r.store.Snapshots().List(t.Context(), store.SnapshotFilter{}); err != nil || len(list) != 1 {
		t.Errorf("records: %+v, %v", list, err)
	}
}

func TestATeamHasItsQuota(t *testing.T) {
	r := newRig(t)
	r.limits = controlplane.Limits{TeamSandboxes: 2, TeamImageBytes: 2 << 20}
	r.fresh()
	a, b := r.create(time.Hour), r.create(time.Hour)
	_, err := r.Create(t.Context(), team, controlplane.CreateRequest{Template: "base", Timeout: time.Hour})
	is(t, err, sandbox.ErrExhausted)
	_, err = r.Fork(t.Context(), team, a.ID, 1, time.Hour)
	is(t, err, sandbox.ErrExhausted)
	r.pause(a.ID) // takes no memory, but disk
	r.create(time.Hour)
	_, _, err = r.Connect(t.Context(), team, a.ID, controlplane.ConnectRequest{Timeout: time.Hour})
	is(t, err, sandbox.ErrExhausted)
	if _, err := r.Snapshot(t.Context(), team, b.ID, ""); err != nil {
		t.Fatal(err)
	}
	_, err = r.Snapshot(t.Context(), team, b.ID, "")
	is(t, err, sandbox.ErrExhausted)
	is(t, r.Pause(t.Context(), team, b.ID, true), sandbox.ErrExhausted)
	if err := r.Kill(t.Context(), team, a.ID); err != nil {
		t.Fatal(err)
	}
	r.pause(b.ID)
}

func TestAnExpiryDoesNotEndWhatIsPausedMeanwhile(t *testing.T) {
	r := newRig(t)
	first, second := r.create(10*time.Millisecond), r.create(10*time.Millisecond)
	// While the first is ended the second, which is due as well, is paused.
	paused := make(chan error, 1)
	once := sync.OnceFunc(func() { paused <- r.Pause(t.Context(), team, second.ID, true) })
	r.store = hookedStore{r.store, func(c store.Change) {
		if !c.IfEndsBy.IsZero() {
			once()
		}
	}}
	r.fresh()
	for time.Now().Before(second.Ends) {
		<-time.After(time.Until(second.Ends))
	}
	r.run()
	if err := <-paused; err != nil {
		t.Fatal(err)
	}
	r.await(first.ID, sandbox.Stopped)
	last := r.create(10 * time.Millisecond)
	r.await(last.ID, sandbox.Stopped) // by then the second's turn has come
	if got := r.record(second.ID); got.State != sandbox.Paused {
		t.Errorf("it is %s: %s", got.State, got.Reason)
	}
}

func TestASandboxIsNotPausedBeyondTheQuotaAtTheEndOfItsTime(t *testing.T) {
	r := newRig(t)
	r.limits = controlplane.Limits{TeamImageBytes: 1 << 20}
	r.fresh()
	r.pause(r.create(time.Hour).ID) // takes it all
	r.run()
	b, err := r.Create(t.Context(), team, controlplane.CreateRequest{
		Template: "base", Timeout: 10 * time.Millisecond, AutoPause: true, AutoPauseMemory: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	r.await(r.create(20*time.Millisecond).ID, sandbox.Stopped)
	if got := r.record(b.ID); got.State != sandbox.Running || time.Until(got.Ends) < 30*time.Second {
		t.Errorf("it is %s and ends in %v", got.State, time.Until(got.Ends))
	}
}

func TestAKilledSandboxIsNotWokenThoughItWasBeingPaused(t *testing.T) {
	r := newRig(t)
	b, err := r.Create(t.Context(), team, controlplane.CreateRequest{
		Template: "base", Timeout: time.Minute, AutoPause: true, AutoPauseMemory: true, AutoResume: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	killed, forgotten := make(chan error, 1), make(chan struct{})
	r.store = afterStore{r.store, func(c store.Change) {
		if c.State == sandbox.Pausing { // recorded, and not noted as asleep
			go func() { killed <- r.Kill(context.WithoutCancel(t.Context()), team, b.ID) }()
			<-forgotten
		}
		if c.State == sandbox.Stopping {
			defer close(forgotten)
		}
	}}
	r.fresh()
	if _, err := r.Resolve(t.Context(), string(b.ID)); err != nil {
		t.Fatal(err)
	}
	if err := r.Pause(t.Context(), team, b.ID, true); err == nil {
		t.Error("the pause went through")
	}
	if err := <-killed; err != nil {
		t.Error(err)
	}
	_, err = r.Resolve(t.Context(), string(b.ID))
	is(t, err, sandbox.ErrNotFound)
}

// afterBoxes are a store's sandboxes with a word after every transition.
type afterBoxes struct {
	store.Sandboxes
	after func(store.Change)
}

func (b afterBoxes) Transition(ctx context.Context, id sandbox.ID, from sandbox.State, c store.Change) error {
	err := b.Sandboxes.Transition(ctx, id, from, c)
	if err == nil {
		b.after(c)
	}
	return err
}

type afterStore struct {
	store.Store
	after func(store.Change)
}

func (s afterStore) Sandboxes() store.Sandboxes { return afterBoxes{s.Store.Sandboxes(), s.after} }

func TestAnAgentThatWasRestartedDuringAPauseGetsTheTokenAgain(t *testing.T) {
	r := newRig(t)
	b := r.create(time.Minute)
	if err := r.store.Sandboxes().Transition(t.Context(), b.ID, sandbox.Running, store.Change{State: sandbox.Pausing}); err != nil {
		t.Fatal(err)
	}
	r.fresh()
	r.run()
	r.await(b.ID, sandbox.Running)
	if r.agent.Token(b.ID) != r.AccessToken(b.ID) {
		t.Errorf("the agent's token is %q", r.agent.Token(b.ID))
	}
}
