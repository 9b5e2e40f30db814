package storetest

import (
	"errors"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// move is one transition of a test.
type move struct {
	from, to sandbox.State
	cause    string
	at       time.Duration // after Epoch
}

func transit(t *testing.T, s store.Store, id sandbox.ID, moves ...move) {
	t.Helper()
	for _, m := range moves {
		c := store.Change{State: m.to, Cause: m.cause, At: Epoch.Add(m.at)}
		must(t, s.Sandboxes().Transition(t.Context(), id, m.from, c))
	}
}

func events(t *testing.T, s store.Store, f store.EventFilter) []sandbox.Event {
	t.Helper()
	list, err := s.Events().List(t.Context(), f)
	must(t, err)
	return list
}

func testEvents(t *testing.T, s store.Store) {
	ctx := t.Context()
	b := Sandbox(0)
	b.State, b.Started = sandbox.Starting, time.Time{}
	must(t, s.Sandboxes().Insert(ctx, b))
	transit(t, s, b.ID,
		move{sandbox.Starting, sandbox.Running, "started", time.Second},
		move{sandbox.Running, sandbox.Pausing, "paused by request", 3 * time.Second},
		move{sandbox.Pausing, sandbox.Paused, "", 7 * time.Second},
		move{sandbox.Paused, sandbox.Resuming, "traffic", 10 * time.Hour},
		move{sandbox.Resuming, sandbox.Running, "", 9 * time.Hour}, // the clock was set back
	)
	must(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Running, store.Change{
		State: sandbox.Stopping, Reason: "it was killed", At: Epoch.Add(11 * time.Hour),
	}))
	must(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Stopping, store.Change{State: sandbox.Stopped, Ended: Epoch.Add(12 * time.Hour)}))

	want := []sandbox.Event{
		{State: sandbox.Starting, Cause: "created", Time: Epoch},
		{From: sandbox.Starting, State: sandbox.Running, Cause: "started", Time: Epoch.Add(time.Second), Duration: time.Second},
		{From: sandbox.Running, State: sandbox.Pausing, Cause: "paused by request", Time: Epoch.Add(3 * time.Second), Duration: 2 * time.Second},
		{From: sandbox.Pausing, State: sandbox.Paused, Time: Epoch.Add(7 * time.Second), Duration: 4 * time.Second},
		{From: sandbox.Paused, State: sandbox.Resuming, Cause: "traffic", Time: Epoch.Add(10 * time.Hour), Duration: 10*time.Hour - 7*time.Second},
		{From: sandbox.Resuming, State: sandbox.Running, Time: Epoch.Add(10 * time.Hour)},
		{From: sandbox.Running, State: sandbox.Stopping, Cause: "it was killed", Time: Epoch.Add(11 * time.Hour), Duration: time.Hour},
		{From: sandbox.Stopping, State: sandbox.Stopped, Cause: "it was killed", Time: Epoch.Add(12 * time.Hour), Duration: time.Hour},
	}
	got := events(t, s, store.EventFilter{SandboxID: b.ID})
	for i := range got {
		if i > 0 && got[i].Seq <= got[i-1].Seq {
			t.Errorf("event %d comes after event %d", got[i].Seq, got[i-1].Seq)
		}
		got[i].Seq = 0
	}
	for i := range want {
		want[i].SandboxID, want[i].TeamID = b.ID, "t1"
	}
	equal(t, want, got)

	_, err := s.Sandboxes().Purge(ctx, Epoch.Add(24*time.Hour))
	must(t, err)
	_, err = s.Sandboxes().Get(ctx, b.ID)
	is(t, err, sandbox.ErrNotFound)
	equal(t, len(want), len(events(t, s, store.EventFilter{SandboxID: b.ID})))
}

func testFirstEvent(t *testing.T, s store.Store) {
	for _, c := range []struct {
		change func(*sandbox.Sandbox)
		cause  string
	}{
		{func(*sandbox.Sandbox) {}, "created"},
		{func(b *sandbox.Sandbox) { b.Spec.SnapshotID = "snap" }, "created from snapshot snap"},
		{func(b *sandbox.Sandbox) { b.SourceID, b.Spec.SnapshotID = "parent", "snap" }, "forked from parent"},
	} {
		b := Sandbox(0)
		b.Changed = Epoch.Add(time.Hour) // what was before that is of another time
		c.change(&b)
		must(t, s.Sandboxes().Insert(t.Context(), b))
		list := events(t, s, store.EventFilter{SandboxID: b.ID})
		equal(t, []sandbox.Event{{
			Seq: list[0].Seq, SandboxID: b.ID, TeamID: "t1", Time: Epoch, State: sandbox.Running, Cause: c.cause,
		}}, list)
	}
}

func testNoEvent(t *testing.T, s store.Store) {
	ctx := t.Context()
	b := Sandbox(0)
	must(t, s.Sandboxes().Insert(ctx, b))
	stop := store.Change{State: sandbox.Stopping}
	is(t, s.Sandboxes().Insert(ctx, b), sandbox.ErrConflict)
	is(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Paused, stop), sandbox.ErrConflict)
	is(t, s.Sandboxes().Transition(ctx, sandbox.NewID(), sandbox.Running, stop), sandbox.ErrNotFound)
	stop.IfEndsBy = b.Ends.Add(-1)
	is(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Running, stop), sandbox.ErrConflict)
	must(t, s.Sandboxes().SetEnds(ctx, b.ID, Epoch))
	equal(t, 1, len(events(t, s, store.EventFilter{})))
}

// testEventRace lets many pause, resume and kill one sandbox: what is recorded
// must be one life, each event beginning where the one before it ended.
func testEventRace(t *testing.T, s store.Store) {
	b := Sandbox(0)
	must(t, s.Sandboxes().Insert(t.Context(), b))
	round := []sandbox.State{sandbox.Running, sandbox.Pausing, sandbox.Paused, sandbox.Resuming, sandbox.Running}
	parallel(8, func(int) {
		for range 5 {
			for i, from := range round[:len(round)-1] {
				err := s.Sandboxes().Transition(t.Context(), b.ID, from, store.Change{State: round[i+1]})
				if err != nil && !errors.Is(err, sandbox.ErrConflict) {
					t.Error(err)
				}
			}
		}
	})
	list := events(t, s, store.EventFilter{SandboxID: b.ID})
	if len(list) < len(round) {
		t.Errorf("only %d events", len(list))
	}
	for i, e := range list[1:] {
		last := list[i]
		if e.From != last.State || e.Seq <= last.Seq || e.Time.Before(last.Time) || e.Time.Sub(last.Time) != e.Duration {
			t.Errorf("%+v follows %+v", e, last)
		}
	}
	got, err := s.Sandboxes().Get(t.Context(), b.ID)
	must(t, err)
	equal(t, list[len(list)-1].State, got.State)
	equal(t, list[len(list)-1].Time, got.Changed)
}

func testEventFilters(t *testing.T, s store.Store) {
	ctx := t.Context()
	mine, other, foreign := Sandbox(0), Sandbox(0), Sandbox(0)
	foreign.TeamID = "t2"
	for _, b := range []sandbox.Sandbox{mine, other, foreign} {
		must(t, s.Sandboxes().Insert(ctx, b))
	}
	transit(t, s, mine.ID, move{sandbox.Running, sandbox.Pausing, "", 0}, move{sandbox.Pausing, sandbox.Paused, "", 0})
	all := events(t, s, store.EventFilter{})
	equal(t, 5, len(all))
	for _, c := range []struct {
		name   string
		filter store.EventFilter
		want   []int // of all
	}{
		{"sandbox", store.EventFilter{SandboxID: mine.ID}, []int{0, 3, 4}},
		{"team", store.EventFilter{TeamID: "t1"}, []int{0, 1, 3, 4}},
		{"the other team's", store.EventFilter{TeamID: "t2", SandboxID: mine.ID}, nil},
		{"limit", store.EventFilter{Limit: 2}, []int{0, 1}},
		{"newest", store.EventFilter{Newest: true, TeamID: "t1", Limit: 3}, []int{4, 3, 1}},
		{"after", store.EventFilter{SandboxID: mine.ID, After: all[0].Seq, Limit: 1}, []int{3}},
		{"after the last", store.EventFilter{After: all[4].Seq}, nil},
		{"before", store.EventFilter{Newest: true, Before: all[3].Seq, TeamID: "t1", Limit: 9}, []int{1, 0}},
		{"between", store.EventFilter{After: all[0].Seq, Before: all[4].Seq}, []int{1, 2, 3}},
	} {
		var want []sandbox.Event
		for _, i := range c.want {
			want = append(want, all[i])
		}
		t.Log(c.name)
		equal(t, want, events(t, s, c.filter))
	}
}

func testEventPurge(t *testing.T, s store.Store) {
	ctx := t.Context()
	a, b := Sandbox(0), Sandbox(0)
	must(t, s.Sandboxes().Insert(ctx, a))
	must(t, s.Sandboxes().Insert(ctx, b))
	transit(t, s, a.ID, move{sandbox.Running, sandbox.Pausing, "", time.Minute}, move{sandbox.Pausing, sandbox.Paused, "", time.Hour})

	purge := func(before time.Duration, want int64) {
		t.Helper()
		n, err := s.Events().Purge(ctx, Epoch.Add(before))
		must(t, err)
		equal(t, want, n)
	}
	purge(0, 0)
	purge(time.Minute, 2)
	left := events(t, s, store.EventFilter{})
	equal(t, 2, len(left))
	equal(t, Epoch.Add(time.Minute), left[0].Time)
	purge(2*time.Hour, 2)
	equal(t, 0, len(events(t, s, store.EventFilter{})))
	_, err := s.Sandboxes().Get(ctx, a.ID)
	must(t, err)

	transit(t, s, b.ID, move{sandbox.Running, sandbox.Pausing, "", 3 * time.Hour})
	equal(t, 1, len(events(t, s, store.EventFilter{After: left[1].Seq})))
}
