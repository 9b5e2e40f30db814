package storetest

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// snapshot returns a ready snapshot of team t1 made n seconds after Epoch.
func snapshot(n int) store.Snapshot {
	return store.Snapshot{
		ID: string(sandbox.NewID()), TeamID: "t1", HostID: "h1", Name: "mine", SandboxID: "parent",
		TemplateID: "tpl1", BuildID: "b1", Alias: "base",
		Resources: sandbox.Resources{CPUs: 2, MemoryMiB: 512, DiskMiB: 1024, PIDs: 99},
		Secured:   true, Kind: store.SnapshotMemory, User: "user", Workdir: "/home/user", EnvdVersion: "0.6.13",
		SizeBytes: 5 << 30, State: store.SnapshotReady, Created: Epoch.Add(time.Duration(n) * time.Second),
	}
}

func testSnapshots(t *testing.T, s store.Store) {
	ctx := t.Context()
	n := snapshot(0)
	n.State, n.SizeBytes, n.Secured, n.AllowInternet, n.Kind = store.SnapshotCreating, 0, false, true, store.SnapshotFiles
	must(t, s.Snapshots().Insert(ctx, n))
	is(t, s.Snapshots().Insert(ctx, n), sandbox.ErrConflict)
	equal(t, n, get(t, s, n.ID))

	is(t, s.Snapshots().SetState(ctx, n.ID, store.SnapshotReady, store.SnapshotDeleting, 0), sandbox.ErrConflict)
	is(t, s.Snapshots().SetState(ctx, "none", store.SnapshotReady, store.SnapshotDeleting, 0), sandbox.ErrNotFound)
	equal(t, n, get(t, s, n.ID))
	must(t, s.Snapshots().SetState(ctx, n.ID, store.SnapshotCreating, store.SnapshotReady, 12345))
	n.State, n.SizeBytes = store.SnapshotReady, 12345
	equal(t, n, get(t, s, n.ID))
	must(t, s.Snapshots().SetState(ctx, n.ID, store.SnapshotReady, store.SnapshotDeleting, 0))
	n.State = store.SnapshotDeleting
	equal(t, n, get(t, s, n.ID))

	must(t, s.Snapshots().Delete(ctx, n.ID))
	is(t, s.Snapshots().Delete(ctx, n.ID), sandbox.ErrNotFound)
	_, err := s.Snapshots().Get(ctx, n.ID)
	is(t, err, sandbox.ErrNotFound)
}

func get(t *testing.T, s store.Store, id string) store.Snapshot {
	t.Helper()
	n, err := s.Snapshots().Get(t.Context(), id)
	must(t, err)
	return n
}

func testSnapshotNames(t *testing.T, s store.Store) {
	ctx := t.Context()
	old, recent, unfinished, foreign := snapshot(0), snapshot(1), snapshot(2), snapshot(3)
	unfinished.State, foreign.TeamID = store.SnapshotCreating, "t2"
	for _, n := range []store.Snapshot{recent, old, unfinished, foreign} {
		must(t, s.Snapshots().Insert(ctx, n))
	}
	named := func(team, name string, want store.Snapshot) {
		t.Helper()
		got, err := s.Snapshots().GetByName(ctx, team, name)
		must(t, err)
		equal(t, want, got)
	}
	named("t1", "mine", recent)
	named("t2", "mine", foreign)
	must(t, s.Snapshots().SetState(ctx, recent.ID, store.SnapshotReady, store.SnapshotDeleting, 0))
	named("t1", "mine", old)
	must(t, s.Snapshots().Delete(ctx, old.ID))
	for _, name := range []string{"mine", "other", ""} {
		_, err := s.Snapshots().GetByName(ctx, "t1", name)
		is(t, err, sandbox.ErrNotFound)
	}
}

func testSnapshotFilters(t *testing.T, s store.Store) {
	ctx := t.Context()
	var all []store.Snapshot // newest first, as lists are
	add := func(n int, change func(*store.Snapshot)) {
		snap := snapshot(n)
		change(&snap)
		must(t, s.Snapshots().Insert(ctx, snap))
		all = append([]store.Snapshot{snap}, all...)
	}
	add(0, func(*store.Snapshot) {})
	add(1, func(n *store.Snapshot) { n.Name = "" })
	add(2, func(n *store.Snapshot) { n.SandboxID = "other" })
	add(3, func(n *store.Snapshot) { n.State = store.SnapshotCreating })
	add(4, func(n *store.Snapshot) { n.TeamID, n.HostID = "t2", "h2" })

	at := func(i int) *store.SnapshotCursor {
		return &store.SnapshotCursor{Created: all[i].Created, ID: all[i].ID}
	}
	for name, c := range map[string]struct {
		filter store.SnapshotFilter
		want   []int // of all
	}{
		"nothing": {store.SnapshotFilter{}, []int{0, 1, 2, 3, 4}},
		"team":    {store.SnapshotFilter{TeamID: "t1"}, []int{1, 2, 3, 4}},
		"host":    {store.SnapshotFilter{HostID: "h2"}, []int{0}},
		"sandbox": {store.SnapshotFilter{SandboxID: "other"}, []int{2}},
		"name":    {store.SnapshotFilter{TeamID: "t1", Ref: "mine"}, []int{1, 2, 4}},
		"id":      {store.SnapshotFilter{TeamID: "t1", Ref: all[3].ID}, []int{3}},
		"not its": {store.SnapshotFilter{TeamID: "t1", Ref: all[0].ID}, nil},
		"state":   {store.SnapshotFilter{States: []store.SnapshotState{store.SnapshotCreating}}, []int{1}},
		"states":  {store.SnapshotFilter{TeamID: "t1", States: []store.SnapshotState{store.SnapshotReady, store.SnapshotDeleting}}, []int{2, 3, 4}},
		"after":   {store.SnapshotFilter{After: at(2), Limit: 9}, []int{3, 4}},
		"limit":   {store.SnapshotFilter{After: at(0), Limit: 2}, []int{1, 2}},
		"all":     {store.SnapshotFilter{TeamID: "t1", HostID: "h1", SandboxID: "parent", Ref: "mine", States: []store.SnapshotState{store.SnapshotReady}, Limit: 1}, []int{4}},
		"none":    {store.SnapshotFilter{TeamID: "t2", Ref: "other"}, nil},
	} {
		var want []store.Snapshot
		for _, i := range c.want {
			want = append(want, all[i])
		}
		got, err := s.Snapshots().List(ctx, c.filter)
		must(t, err)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}

	for range 7 { // of one moment
		add(5, func(*store.Snapshot) {})
	}
	whole, err := s.Snapshots().List(ctx, store.SnapshotFilter{})
	must(t, err)
	var paged []store.Snapshot
	for f := (store.SnapshotFilter{Limit: 3}); ; {
		page, err := s.Snapshots().List(ctx, f)
		must(t, err)
		if len(page) == 0 {
			break
		}
		paged = append(paged, page...)
		f.After = &store.SnapshotCursor{Created: page[len(page)-1].Created, ID: page[len(page)-1].ID}
	}
	equal(t, len(all), len(paged))
	equal(t, whole, paged)
}

func testTeamBytes(t *testing.T, s store.Store) {
	sum := func(want int64) {
		t.Helper()
		got, err := s.Snapshots().TeamBytes(t.Context(), "t1")
		must(t, err)
		equal(t, want, got)
	}
	sum(0)
	a, b, unfinished, foreign := snapshot(0), snapshot(0), snapshot(0), snapshot(0)
	unfinished.State, foreign.TeamID = store.SnapshotCreating, "t2"
	for _, n := range []store.Snapshot{a, b, unfinished, foreign} {
		must(t, s.Snapshots().Insert(t.Context(), n))
	}
	sum(10 << 30)
	must(t, s.Snapshots().Delete(t.Context(), a.ID))
	sum(5 << 30)
}
