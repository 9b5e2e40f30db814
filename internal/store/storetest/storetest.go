// Package storetest is the suite that every implementation of store.Store passes.
package storetest

import (
	"crypto/sha256"
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// Run runs the suite; open returns a new empty store that is closed by the
// test's clean-up.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for name, test := range map[string]func(*testing.T, store.Store){
		"a team is found by id and slug and its slug is unique":            testTeams,
		"an API key is found by its hash only":                             testAPIKeys,
		"a template is replaced by its id and found by its alias":          testTemplates,
		"a sandbox comes back as it was inserted, without its environment": testInsert,
		"a transition happens only from the state it names":                testTransition,
		"of many racing transitions exactly one wins":                      testTransitionRace,
		"an expiry loses against an extension":                             testExpiryCondition,
		"the end of a running sandbox is set and extended":                 testEnds,
		"racing extensions leave the latest end":                           testExtendRace,
		"every filter of a list holds":                                     testFilters,
		"pages follow each other in both orders without gaps or repeats":   testPages,
		"the purge takes ended sandboxes only":                             testPurge,
		"every transition is an event, also when the sandbox is gone":      testEvents,
		"how a sandbox came to be is its first event":                      testFirstEvent,
		"a transition that did not happen is no event":                     testNoEvent,
		"racing transitions leave one chain of events":                     testEventRace,
		"every filter of events holds":                                     testEventFilters,
		"events are purged oldest first and their numbers not used again":  testEventPurge,
		"a snapshot goes from state to state and can be deleted":           testSnapshots,
		"the newest ready snapshot of a name is the one":                   testSnapshotNames,
		"every filter of snapshots holds":                                  testSnapshotFilters,
		"a team's snapshots are summed up":                                 testTeamBytes,
	} {
		t.Run(name, func(t *testing.T) {
			s := open(t)
			if name != "a team is found by id and slug and its slug is unique" {
				addTeam(t, s, "t1")
				addTeam(t, s, "t2")
			}
			test(t, s)
		})
	}
}

// Epoch is the time the suite's records are from.
var Epoch = time.Date(2026, 5, 4, 3, 2, 1, 123456789, time.UTC)

func addTeam(t *testing.T, s store.Store, id string) {
	t.Helper()
	must(t, s.Teams().Insert(t.Context(), store.Team{ID: id, Slug: "slug-" + id, Name: "Team " + id, Created: Epoch}))
}

// Sandbox returns a running sandbox of team t1 that started n seconds after Epoch.
func Sandbox(n int) sandbox.Sandbox {
	return sandbox.Sandbox{
		ID: sandbox.NewID(), TeamID: "t1", HostID: "h1", State: sandbox.Running, Alias: "base",
		Address: "10.1.2.3", EnvdVersion: "0.6.13",
		Spec: sandbox.Spec{
			TemplateID: "tpl1", BuildID: "b1", Secured: true, AllowInternetAccess: true, Timeout: 5 * time.Minute,
			Resources: sandbox.Resources{CPUs: 2, MemoryMiB: 512, DiskMiB: 1024, PIDs: 99},
			Metadata:  map[string]string{},
		},
		Created: Epoch, Changed: Epoch, Started: Epoch.Add(time.Duration(n) * time.Second), Ends: Epoch.Add(time.Hour),
	}
}

func testTeams(t *testing.T, s store.Store) {
	addTeam(t, s, "t1")
	want := store.Team{ID: "t1", Slug: "slug-t1", Name: "Team t1", Created: Epoch}
	got, err := s.Teams().Get(t.Context(), "t1")
	must(t, err)
	equal(t, want, got)
	got, err = s.Teams().GetBySlug(t.Context(), "slug-t1")
	must(t, err)
	equal(t, want, got)
	_, err = s.Teams().Get(t.Context(), "none")
	is(t, err, sandbox.ErrNotFound)
	is(t, s.Teams().Insert(t.Context(), store.Team{ID: "t9", Slug: "slug-t1"}), sandbox.ErrConflict)
}

func testAPIKeys(t *testing.T, s store.Store) {
	ctx := t.Context()
	k := store.APIKey{ID: "k1", TeamID: "t1", Name: "laptop", Hash: sha256.Sum256([]byte("e2b_1")), Created: Epoch}
	must(t, s.APIKeys().Insert(ctx, k))
	got, err := s.APIKeys().GetByHash(ctx, k.Hash)
	must(t, err)
	equal(t, k, got)
	_, err = s.APIKeys().GetByHash(ctx, sha256.Sum256([]byte("e2b_2")))
	is(t, err, sandbox.ErrNotFound)
	is(t, s.APIKeys().Insert(ctx, store.APIKey{ID: "k2", TeamID: "t2", Hash: k.Hash}), sandbox.ErrConflict)
	if err := s.APIKeys().Insert(ctx, store.APIKey{ID: "k3", TeamID: "nobody", Hash: [32]byte{1}}); err == nil {
		t.Error("a key of a team that is not there was accepted")
	}
	list, err := s.APIKeys().List(ctx, "t1")
	must(t, err)
	equal(t, []store.APIKey{k}, list)
	is(t, s.APIKeys().Delete(ctx, "t2", "k1"), sandbox.ErrNotFound)
	must(t, s.APIKeys().Delete(ctx, "t1", "k1"))
	_, err = s.APIKeys().GetByHash(ctx, k.Hash)
	is(t, err, sandbox.ErrNotFound)
}

func testTemplates(t *testing.T, s store.Store) {
	ctx := t.Context()
	base := store.Template{EnvVars: map[string]string{"LANG": "C.UTF-8"},
		ID: "tpl1", Alias: "base", TeamID: "t1", Public: true, BuildID: "b1", CPUs: 2, MemoryMiB: 512, DiskMiB: 1024,
		User: "user", Workdir: "/home/user", EnvdVersion: "0.6.13", Created: Epoch, Updated: Epoch,
	}
	must(t, s.Templates().Put(ctx, base))
	private := base
	private.ID, private.Alias, private.Public, private.Created = "tpl2", "mine", false, Epoch.Add(1)
	must(t, s.Templates().Put(ctx, private))
	is(t, s.Templates().Put(ctx, store.Template{ID: "tpl3", Alias: "base", TeamID: "t2"}), sandbox.ErrConflict)

	again := base
	again.BuildID, again.Created, again.Updated = "b2", Epoch.Add(time.Hour), Epoch.Add(time.Hour)
	must(t, s.Templates().Put(ctx, again))
	again.Created = Epoch
	got, err := s.Templates().Get(ctx, "tpl1")
	must(t, err)
	equal(t, again, got)
	got, err = s.Templates().GetByAlias(ctx, "base")
	must(t, err)
	equal(t, again, got)
	_, err = s.Templates().GetByAlias(ctx, "tpl1")
	is(t, err, sandbox.ErrNotFound)

	list, err := s.Templates().ListVisible(ctx, "t1")
	must(t, err)
	equal(t, []store.Template{again, private}, list)
	list, err = s.Templates().ListVisible(ctx, "t2")
	must(t, err)
	equal(t, []store.Template{again}, list)
}

func testInsert(t *testing.T, s store.Store) {
	b := Sandbox(0)
	b.Reason, b.Ended = "why", Epoch.Add(2*time.Hour)
	b.Spec.Metadata = map[string]string{"a": "b c", "ü\"'": "%_\\", "": "empty name"}
	b.Spec.EnvVars = map[string]string{"TOKEN": "secret"}
	b.Spec.Protected, b.Spec.MaskRequestHost = true, "app.test:${PORT}"
	b.Spec.AutoPause, b.Spec.AutoPauseMemory, b.Spec.AutoResume = true, true, true
	b.Spec.SnapshotID, b.SourceID, b.MemoryKept, b.Changed = "snap", sandbox.NewID(), true, Epoch.Add(time.Minute)
	must(t, s.Sandboxes().Insert(t.Context(), b))
	got, err := s.Sandboxes().Get(t.Context(), b.ID)
	must(t, err)
	is(t, s.Sandboxes().Insert(t.Context(), b), sandbox.ErrConflict)
	b.Spec.EnvVars = nil
	equal(t, b, got)
	_, err = s.Sandboxes().Get(t.Context(), sandbox.NewID())
	is(t, err, sandbox.ErrNotFound)

	// Each of them by itself: three of a kind side by side are easily mixed up.
	for name, set := range map[string]func(*sandbox.Sandbox){
		"auto-pause":        func(b *sandbox.Sandbox) { b.Spec.AutoPause = true },
		"auto-pause memory": func(b *sandbox.Sandbox) { b.Spec.AutoPauseMemory = true },
		"auto-resume":       func(b *sandbox.Sandbox) { b.Spec.AutoResume = true },
		"memory kept":       func(b *sandbox.Sandbox) { b.MemoryKept = true },
		"unchanged":         func(b *sandbox.Sandbox) { b.Changed = time.Time{} },
	} {
		b := Sandbox(0)
		set(&b)
		must(t, s.Sandboxes().Insert(t.Context(), b))
		got, err := s.Sandboxes().Get(t.Context(), b.ID)
		must(t, err)
		if b.Changed.IsZero() {
			b.Changed = b.Created
		}
		if diff := cmp.Diff(b, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
	}
}

func testTransition(t *testing.T, s store.Store) {
	ctx := t.Context()
	b := Sandbox(0)
	b.State, b.Address, b.Started, b.EnvdVersion = sandbox.Starting, "", time.Time{}, ""
	must(t, s.Sandboxes().Insert(ctx, b))
	c := store.Change{State: sandbox.Running, Address: "10.0.0.1", EnvdVersion: "1.2.3", Started: Epoch.Add(1), Ends: Epoch.Add(2)}
	is(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Resuming, c), sandbox.ErrConflict)
	is(t, s.Sandboxes().Transition(ctx, sandbox.NewID(), sandbox.Starting, c), sandbox.ErrNotFound)
	if err := s.Sandboxes().Transition(ctx, b.ID, sandbox.Starting, store.Change{State: sandbox.Paused}); err == nil {
		t.Error("an illegal transition was accepted")
	}
	must(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Starting, c))
	is(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Starting, c), sandbox.ErrConflict)
	keep, size := true, int64(12345)
	must(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Running, store.Change{State: sandbox.Pausing, MemoryKept: &keep, At: Epoch.Add(2)}))
	must(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Pausing, store.Change{State: sandbox.Paused, ImageBytes: &size, AutoPause: &keep}))
	if n, err := s.Sandboxes().ImageBytes(ctx, b.TeamID); err != nil || n != size {
		t.Errorf("paused sandboxes take %d bytes, %v", n, err)
	}
	if n, err := s.Sandboxes().ImageBytes(ctx, "another team"); err != nil || n != 0 {
		t.Errorf("paused sandboxes of another team take %d bytes, %v", n, err)
	}
	b.State, b.Address, b.EnvdVersion, b.Started, b.Ends = sandbox.Paused, "10.0.0.1", "1.2.3", Epoch.Add(1), Epoch.Add(2)
	b.MemoryKept, b.ImageBytes, b.Spec.AutoPause = true, size, true
	got, err := s.Sandboxes().Get(ctx, b.ID)
	must(t, err)
	if since := time.Since(got.Changed); since < 0 || since > time.Minute {
		t.Errorf("a transition without a time was recorded %s ago", since)
	}
	b.Changed = got.Changed
	equal(t, b, got)
	must(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Paused, store.Change{State: sandbox.Resuming}))
	keep = false
	must(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Resuming, store.Change{
		State: sandbox.Running, Address: "10.0.0.2", Ends: Epoch.Add(4), MemoryKept: &keep,
	}))
	b.Address, b.Ends, b.MemoryKept = "10.0.0.2", Epoch.Add(4), false
	died := time.Now().Add(time.Hour).UTC()
	must(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Running, store.Change{State: sandbox.Failed, Reason: "oom", Ended: died}))

	b.State, b.Reason, b.Ended, b.Changed = sandbox.Failed, "oom", died, died
	got, err = s.Sandboxes().Get(ctx, b.ID)
	must(t, err)
	equal(t, b, got)
}

func testTransitionRace(t *testing.T, s store.Store) {
	b := Sandbox(0)
	must(t, s.Sandboxes().Insert(t.Context(), b))
	var won atomic.Int32
	parallel(8, func(int) {
		switch err := s.Sandboxes().Transition(t.Context(), b.ID, sandbox.Running, store.Change{State: sandbox.Stopping}); {
		case err == nil:
			won.Add(1)
		case !errors.Is(err, sandbox.ErrConflict):
			t.Error(err)
		}
	})
	if won.Load() != 1 {
		t.Errorf("%d transitions won", won.Load())
	}
}

func testExpiryCondition(t *testing.T, s store.Store) {
	ctx := t.Context()
	b := Sandbox(0)
	must(t, s.Sandboxes().Insert(ctx, b))
	expire := store.Change{State: sandbox.Stopping, IfEndsBy: b.Ends}
	_, err := s.Sandboxes().ExtendEnds(ctx, b.ID, b.Ends.Add(1))
	must(t, err)
	is(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Running, expire), sandbox.ErrConflict)
	expire.IfEndsBy = b.Ends.Add(1)
	must(t, s.Sandboxes().Transition(ctx, b.ID, sandbox.Running, expire))
}

func testEnds(t *testing.T, s store.Store) {
	ctx := t.Context()
	_, any, err := s.Sandboxes().NextEnd(ctx, "h1")
	must(t, err)
	equal(t, false, any)
	a, b, other := Sandbox(0), Sandbox(1), Sandbox(2)
	b.Ends = Epoch.Add(30 * time.Minute)
	other.HostID, other.Ends = "h2", Epoch
	for _, x := range []sandbox.Sandbox{a, b, other} {
		must(t, s.Sandboxes().Insert(ctx, x))
	}
	next := func(want time.Time) {
		t.Helper()
		got, any, err := s.Sandboxes().NextEnd(ctx, "h1")
		must(t, err)
		equal(t, true, any)
		equal(t, want, got)
	}
	next(b.Ends)
	must(t, s.Sandboxes().SetEnds(ctx, b.ID, Epoch.Add(2*time.Hour)))
	next(a.Ends)
	must(t, s.Sandboxes().SetEnds(ctx, b.ID, Epoch.Add(time.Minute)))
	next(Epoch.Add(time.Minute))
	end, err := s.Sandboxes().ExtendEnds(ctx, b.ID, Epoch.Add(time.Second))
	must(t, err)
	equal(t, Epoch.Add(time.Minute), end)
	end, err = s.Sandboxes().ExtendEnds(ctx, b.ID, Epoch.Add(3*time.Hour))
	must(t, err)
	equal(t, Epoch.Add(3*time.Hour), end)

	must(t, s.Sandboxes().Transition(ctx, a.ID, sandbox.Running, store.Change{State: sandbox.Stopping}))
	next(Epoch.Add(3 * time.Hour))
	is(t, s.Sandboxes().SetEnds(ctx, a.ID, Epoch), sandbox.ErrConflict)
	_, err = s.Sandboxes().ExtendEnds(ctx, a.ID, Epoch)
	is(t, err, sandbox.ErrConflict)
	is(t, s.Sandboxes().SetEnds(ctx, sandbox.NewID(), Epoch), sandbox.ErrNotFound)
	_, err = s.Sandboxes().ExtendEnds(ctx, sandbox.NewID(), Epoch)
	is(t, err, sandbox.ErrNotFound)
}

func testExtendRace(t *testing.T, s store.Store) {
	b := Sandbox(0)
	must(t, s.Sandboxes().Insert(t.Context(), b))
	parallel(16, func(i int) {
		if _, err := s.Sandboxes().ExtendEnds(t.Context(), b.ID, b.Ends.Add(time.Duration(i*7%16)*time.Second)); err != nil {
			t.Error(err)
		}
	})
	got, err := s.Sandboxes().Get(t.Context(), b.ID)
	must(t, err)
	equal(t, b.Ends.Add(15*time.Second), got.Ends)
}

func testFilters(t *testing.T, s store.Store) {
	ctx := t.Context()
	names := map[sandbox.ID]string{}
	add := func(name string, n int, change func(*sandbox.Sandbox)) {
		b := Sandbox(n)
		change(&b)
		names[b.ID] = name
		must(t, s.Sandboxes().Insert(ctx, b))
	}
	add("plain", 0, func(*sandbox.Sandbox) {})
	add("labelled", 1, func(b *sandbox.Sandbox) { b.Spec.Metadata = map[string]string{"app": "prod", "user": "o'neil%"} })
	add("other label", 2, func(b *sandbox.Sandbox) { b.Spec.Metadata = map[string]string{"app": "prod", "user": "eve"} })
	add("other template", 3, func(b *sandbox.Sandbox) { b.Spec.TemplateID, b.Alias = "tpl2", "desktop" })
	add("stopping", 4, func(b *sandbox.Sandbox) { b.State = sandbox.Stopping })
	add("foreign", 5, func(b *sandbox.Sandbox) { b.TeamID, b.HostID, b.Ends = "t2", "h2", Epoch })
	add("paused", 6, func(b *sandbox.Sandbox) { b.State, b.HostID, b.Spec.SnapshotID = sandbox.Paused, "h3", "snap" })

	for _, c := range []struct {
		name   string
		filter store.Filter
		want   []string
	}{
		{"nothing", store.Filter{}, []string{"paused", "foreign", "stopping", "other template", "other label", "labelled", "plain"}},
		{"limit", store.Filter{Limit: 2}, []string{"paused", "foreign"}},
		{"team", store.Filter{TeamID: "t1", Ascending: true}, []string{"plain", "labelled", "other label", "other template", "stopping", "paused"}},
		{"host", store.Filter{HostID: "h2"}, []string{"foreign"}},
		{"one state", store.Filter{States: []sandbox.State{sandbox.Stopping}}, []string{"stopping"}},
		{"states", store.Filter{States: []sandbox.State{sandbox.Stopping, sandbox.Running}, Limit: 2}, []string{"foreign", "stopping"}},
		{"paused", store.Filter{States: []sandbox.State{sandbox.Paused}}, []string{"paused"}},
		{"no such state", store.Filter{States: []sandbox.State{sandbox.Resuming}}, nil},
		{"snapshot", store.Filter{Template: "snap"}, []string{"paused"}},
		{"template id", store.Filter{Template: "tpl2"}, []string{"other template"}},
		{"alias", store.Filter{Template: "desktop"}, []string{"other template"}},
		{"one pair", store.Filter{Metadata: map[string]string{"app": "prod"}}, []string{"other label", "labelled"}},
		{"two pairs", store.Filter{Metadata: map[string]string{"app": "prod", "user": "o'neil%"}}, []string{"labelled"}},
		{"a pair nobody has", store.Filter{Metadata: map[string]string{"app": "prod", "x": ""}}, nil},
		{"started at or after", store.Filter{StartedAfter: Epoch.Add(4 * time.Second)}, []string{"paused", "foreign", "stopping"}},
		{"over by", store.Filter{EndsBy: Epoch}, []string{"foreign"}},
		{"all together", store.Filter{
			TeamID: "t1", HostID: "h1", States: []sandbox.State{sandbox.Running}, Template: "base",
			Metadata: map[string]string{"user": "eve"}, StartedAfter: Epoch, EndsBy: Epoch.Add(time.Hour), Limit: 9,
		}, []string{"other label"}},
	} {
		list, err := s.Sandboxes().List(ctx, c.filter)
		must(t, err)
		var got []string
		for _, b := range list {
			got = append(got, names[b.ID])
		}
		if diff := cmp.Diff(c.want, got); diff != "" {
			t.Errorf("%s: %s", c.name, diff)
		}
		c.filter.Limit = 0
		list, err = s.Sandboxes().List(ctx, c.filter)
		must(t, err)
		n, err := s.Sandboxes().Count(ctx, c.filter)
		must(t, err)
		equal(t, len(list), n)
	}
}

func testPages(t *testing.T, s store.Store) {
	ctx := t.Context()
	const total = 23
	for i := range total {
		must(t, s.Sandboxes().Insert(ctx, Sandbox(i/5))) // five start at the same moment
	}
	for _, ascending := range []bool{true, false} {
		whole, err := s.Sandboxes().List(ctx, store.Filter{Ascending: ascending})
		must(t, err)
		var paged []sandbox.Sandbox
		f := store.Filter{Ascending: ascending, Limit: 3}
		for {
			page, err := s.Sandboxes().List(ctx, f)
			must(t, err)
			if len(page) == 0 {
				break
			}
			paged = append(paged, page...)
			last := page[len(page)-1]
			f.After = &store.Cursor{Started: last.Started, ID: last.ID}
		}
		equal(t, total, len(paged))
		equal(t, whole, paged)
	}
}

func testPurge(t *testing.T, s store.Store) {
	ctx := t.Context()
	running, old, recent := Sandbox(0), Sandbox(1), Sandbox(2)
	old.State, old.Ended, old.Spec.Metadata = sandbox.Stopped, Epoch, map[string]string{"a": "b"}
	recent.State, recent.Ended = sandbox.Failed, Epoch.Add(time.Minute)
	for _, b := range []sandbox.Sandbox{running, old, recent} {
		must(t, s.Sandboxes().Insert(ctx, b))
	}
	n, err := s.Sandboxes().Purge(ctx, Epoch.Add(time.Second))
	must(t, err)
	equal(t, int64(1), n)
	_, err = s.Sandboxes().Get(ctx, old.ID)
	is(t, err, sandbox.ErrNotFound)
	must(t, s.Sandboxes().Insert(ctx, old)) // nothing of it was left, its metadata included
}

func parallel(n int, f func(i int)) {
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { f(i) })
	}
	wg.Wait()
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func is(t *testing.T, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got error %v, want %v", err, want)
	}
}

func equal[T any](t *testing.T, want, got T) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("not as expected (-want +got):\n%s", diff)
	}
}
