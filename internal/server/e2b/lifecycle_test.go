package e2b_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/server/e2b"
	"github.com/wrenn/wrenn/internal/store"
)

// lifecyclePlane is a control plane that notes what it is asked about pauses, forks
// and snapshots. While it has an answer for a test, that is what it answers.
type lifecyclePlane struct {
	e2b.ControlPlane
	asked  []string
	err    error
	box    *sandbox.Sandbox
	forks  []controlplane.Forked
	snap   *store.Snapshot
	snaps  []store.Snapshot
	filter store.SnapshotFilter
}

func (p *lifecyclePlane) note(format string, args ...any) {
	p.asked = append(p.asked, fmt.Sprintf(format, args...))
}

// was returns what it was asked since the last time.
func (p *lifecyclePlane) was() string {
	asked := strings.Join(p.asked, "; ")
	p.asked = nil
	return asked
}

func text[T any](p *T) string {
	if p == nil {
		return "-"
	}
	return fmt.Sprint(*p)
}

func (p *lifecyclePlane) Pause(ctx context.Context, team string, id sandbox.ID, memory bool) error {
	p.note("pause %v", memory)
	if p.box == nil && p.err == nil {
		return p.ControlPlane.Pause(ctx, team, id, memory)
	}
	return p.err
}

func (p *lifecyclePlane) Connect(ctx context.Context, team string, id sandbox.ID, req controlplane.ConnectRequest) (sandbox.Sandbox, bool, error) {
	p.note("connect %v %s", req.Timeout, text(req.Memory))
	if p.box == nil {
		return p.ControlPlane.Connect(ctx, team, id, req)
	}
	return *p.box, true, p.err
}

func (p *lifecyclePlane) Resume(ctx context.Context, team string, id sandbox.ID, req controlplane.ResumeRequest) (sandbox.Sandbox, error) {
	p.note("resume %v %s %s", req.Timeout, text(req.AutoPause), text(req.Memory))
	if p.box == nil {
		return p.ControlPlane.Resume(ctx, team, id, req)
	}
	return *p.box, p.err
}

func (p *lifecyclePlane) Fork(ctx context.Context, team string, id sandbox.ID, count int, timeout time.Duration) ([]controlplane.Forked, error) {
	p.note("fork %d %v", count, timeout)
	if p.forks == nil {
		return p.ControlPlane.Fork(ctx, team, id, count, timeout)
	}
	return p.forks, p.err
}

func (p *lifecyclePlane) Snapshot(ctx context.Context, team string, id sandbox.ID, name string) (store.Snapshot, error) {
	p.note("snapshot %q", name)
	if p.snap == nil {
		return p.ControlPlane.Snapshot(ctx, team, id, name)
	}
	n := *p.snap
	n.Name = name
	return n, p.err
}

func (p *lifecyclePlane) Snapshots(ctx context.Context, team string, f store.SnapshotFilter) ([]store.Snapshot, error) {
	p.note("snapshots")
	p.filter = f
	if p.snaps == nil {
		return p.ControlPlane.Snapshots(ctx, team, f)
	}
	return p.snaps, p.err
}

func (p *lifecyclePlane) DeleteSnapshot(ctx context.Context, team, ref string) error {
	p.note("delete %q", ref)
	if p.snap == nil {
		return p.ControlPlane.DeleteSnapshot(ctx, team, ref)
	}
	return p.err
}

func (p *lifecyclePlane) Create(ctx context.Context, team string, req controlplane.CreateRequest) (sandbox.Sandbox, error) {
	p.note("create %v %v %v", req.AutoPause, req.AutoPauseMemory, req.AutoResume)
	return p.ControlPlane.Create(ctx, team, req)
}

func TestPauseAndResumeAreAskedAsTheyWereMeant(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	path := "/sandboxes/" + id
	box, err := r.store.Sandboxes().Get(t.Context(), idOf(id))
	if err != nil {
		t.Fatal(err)
	}
	r.fake.box = &box
	r.fake.was()
	for _, c := range []struct {
		operation, body string
		status          int
		asked           string
	}{
		{"POST " + path + "/pause", "", 204, "pause true"},
		{"POST " + path + "/pause", "{}", 204, "pause true"},
		{"POST " + path + "/pause", `{"memory":true}`, 204, "pause true"},
		{"POST " + path + "/pause", `{"memory":false}`, 204, "pause false"},
		{"POST " + path + "-00000000/pause", "", 204, "pause true"},
		{"POST " + path + "/resume", "", 201, "resume 15s - -"},
		{"POST " + path + "/resume", `{"timeout":40,"autoPause":false,"memory":false}`, 201, "resume 40s false false"},
		{"POST " + path + "/resume", `{"autoPause":true}`, 201, "resume 15s true -"},
		{"POST " + path + "/connect", `{"timeout":10}`, 201, "connect 10s -"},
		{"POST " + path + "/connect", `{"timeout":10,"memory":false}`, 201, "connect 10s false"},
		{"POST /v2" + path + "/connect", "", 201, "connect 5m0s -"},
		{"POST /v2" + path + "/connect", `{"timeout":10,"memory":true}`, 201, "connect 10s true"},
	} {
		method, path, _ := strings.Cut(c.operation, " ")
		var body any
		if c.body != "" {
			body = strings.NewReader(c.body)
		}
		a := r.do(method, path, body)
		if c.status == 204 {
			r.empty(a)
		} else {
			got := r.object(a, c.status)
			same(t, "id", got["sandboxID"], any(id))
			same(t, "token", got["envdAccessToken"], any(r.plane.AccessToken(idOf(id))))
		}
		same(t, c.operation+" "+c.body, r.fake.was(), c.asked)
	}
	r.fake.err = sandbox.Errorf(sandbox.ErrConflict, "sandbox %q is paused", id)
	r.fails(r.do("POST", path+"/pause", nil), 409, "is paused")
	r.fake.err = sandbox.Errorf(sandbox.ErrUnavailable, "the disk is full")
	r.fails(r.do("POST", path+"/pause", nil), 503, "disk")
}

func TestWhatHappensAtTheEndOfATimeIsAskedFor(t *testing.T) {
	r := newRig(t)
	for body, want := range map[string]string{
		`{"templateID":"base"}`: "create false true false",
		`{"templateID":"base","autoPause":false,"autoPauseMemory":true}`:                "create false true false",
		`{"templateID":"base","autoPause":true}`:                                        "create true true false",
		`{"templateID":"base","autoPause":true,"autoPauseMemory":false}`:                "create true false false",
		`{"templateID":"base","autoPause":true,"autoResume":{"enabled":true}}`:          "create true true true",
		`{"templateID":"base","autoResume":{"enabled":true}}`:                           "create false true true",
		`{"templateID":"base","autoPause":true,"autoResume":{"enabled":false}}`:         "create true true false",
		`{"templateID":"base","autoPause":true,"autoPauseMemory":null,"autoResume":{}}`: "create true true false",
	} {
		for _, path := range []string{"/sandboxes", "/v2/sandboxes"} {
			r.object(r.do("POST", path, body), 201)
			same(t, body, r.fake.was(), want)
		}
	}
}

// put adds a record in the given state, changed a minute ago.
func (r *rig) put(state sandbox.State, change func(*sandbox.Sandbox)) string {
	r.t.Helper()
	now := time.Now()
	b := sandbox.Sandbox{
		ID: sandbox.NewID(), TeamID: controlplane.DefaultTeam, HostID: "h1", State: state, Alias: "base",
		Spec:    sandbox.Spec{TemplateID: "tpl1", Secured: true},
		Created: now.Add(-time.Hour), Started: now.Add(-time.Hour), Changed: now.Add(-time.Minute), Ends: now.Add(time.Hour),
	}
	change(&b)
	if err := r.store.Sandboxes().Insert(r.t.Context(), b); err != nil {
		r.t.Fatal(err)
	}
	return string(b.ID)
}

func TestPausedIsWhoeverCannotBeTalkedTo(t *testing.T) {
	r := newRig(t)
	plain := func(*sandbox.Sandbox) {}
	running, foreign := r.put(sandbox.Running, plain), func(b *sandbox.Sandbox) { b.TeamID = "t2" }
	pausing, paused, resuming := r.put(sandbox.Pausing, plain), r.put(sandbox.Paused, plain), r.put(sandbox.Resuming, plain)
	r.put(sandbox.Stopped, plain)
	r.put(sandbox.Paused, foreign)

	for query, want := range map[string][]string{
		"":                     {running, pausing, paused, resuming},
		"state=running":        {running},
		"state=paused":         {pausing, paused, resuming},
		"state=paused,running": {running, pausing, paused, resuming},
	} {
		a := r.do("GET", "/v2/sandboxes?order=asc&"+query, nil)
		states := make(map[string]string)
		for _, b := range r.list(a, 200) {
			states[b["sandboxID"].(string)] = b["state"].(string)
		}
		wanted := make(map[string]string)
		for _, id := range want {
			wanted[id] = "paused"
			if id == running {
				wanted[id] = "running"
			}
		}
		same(t, query, states, wanted)
		total := "1"
		if query == "state=paused" {
			total = ""
		}
		same(t, "total of running", a.Header.Get("X-Total-Running"), total)
	}
	same(t, "of the first generation", len(r.list(r.do("GET", "/sandboxes", nil), 200)), 1)

	got := r.object(r.do("GET", "/sandboxes/"+paused, nil), 200)
	same(t, "state", got["state"], any("paused"))
	if d := lives(t, got); d > -50*time.Second {
		t.Errorf("a paused sandbox ends in %v, want when it was paused", d)
	}
	same(t, "token", got["envdAccessToken"], any(r.plane.AccessToken(idOf(paused))))
}

func TestPagesOfRunningAndPausedFollowEachOther(t *testing.T) {
	r := newRig(t)
	var want, got []string
	for i, state := range []sandbox.State{sandbox.Paused, sandbox.Running, sandbox.Pausing, sandbox.Running, sandbox.Paused} {
		want = append(want, r.put(state, func(b *sandbox.Sandbox) { b.Started = b.Started.Add(time.Duration(i) * time.Second) }))
	}
	for token := "-"; token != ""; {
		a := r.do("GET", "/v2/sandboxes?limit=2&order=asc&nextToken="+strings.Trim(token, "-"), nil)
		for _, b := range r.list(a, 200) {
			got = append(got, b["sandboxID"].(string))
		}
		same(t, "total", a.Header.Get("X-Total-Running"), "2")
		token = a.Header.Get("X-Next-Token")
	}
	same(t, "all pages", got, want)
}

func TestASandboxSaysWhatItCameFromAndWhereItGoes(t *testing.T) {
	r := newRig(t)
	for _, c := range []struct {
		name      string
		change    func(*sandbox.Sandbox)
		template  string
		lifecycle map[string]any
	}{
		{"from a template", func(*sandbox.Sandbox) {}, "tpl1", map[string]any{"autoResume": false, "onTimeout": "kill"}},
		{"from a snapshot", func(b *sandbox.Sandbox) {
			b.Spec.SnapshotID, b.Spec.AutoPause = "snap", true
		}, "snap", map[string]any{"autoResume": false, "onTimeout": "pause"}},
		{"a fork", func(b *sandbox.Sandbox) {
			b.Spec.SnapshotID, b.SourceID, b.Spec.AutoResume = "image", "parent", true
		}, "tpl1", map[string]any{"autoResume": true, "onTimeout": "kill"}},
	} {
		got := r.object(r.do("GET", "/sandboxes/"+r.put(sandbox.Running, c.change), nil), 200)
		same(t, c.name, got["templateID"], any(c.template))
		same(t, c.name, got["lifecycle"], any(c.lifecycle))
	}
	same(t, "by snapshot", len(r.list(r.do("GET", "/v2/sandboxes?template=snap", nil), 200)), 1)
}

func TestEveryForkHasAResult(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	path := "/sandboxes/" + id + "/fork"
	child := sandbox.Sandbox{ID: sandbox.NewID(), SourceID: idOf(id), Spec: sandbox.Spec{TemplateID: "tpl1", Secured: true}}
	r.fake.forks = []controlplane.Forked{
		{Sandbox: child},
		{Err: sandbox.Errorf(sandbox.ErrUnavailable, "no capacity")},
		{Err: errors.New("secret detail")},
	}
	r.fake.was()
	got := r.list(r.do("POST", path, nil), 201)
	same(t, "asked", r.fake.was(), "fork 1 15s")
	same(t, "results", len(got), 3)
	box := got[0]["sandbox"].(map[string]any)
	same(t, "fields", keys(box), []string{"clientID", "domain", "envdAccessToken", "envdVersion", "sandboxID", "templateID"})
	same(t, "id", box["sandboxID"], any(string(child.ID)))
	same(t, "token", box["envdAccessToken"], any(r.plane.AccessToken(child.ID)))
	same(t, "success", keys(got[0]), []string{"sandbox"})
	same(t, "failure", got[1], map[string]any{"error": map[string]any{"code": 503.0, "message": "no capacity"}})
	internal := got[2]["error"].(map[string]any)
	if internal["code"] != 500.0 || strings.Contains(internal["message"].(string), "secret") || !strings.Contains(r.log.String(), "secret detail") {
		t.Errorf("an internal failure is shown as %v and logged as %s", internal, r.log)
	}
	r.list(r.do("POST", path, strings.NewReader(`{"count":100,"timeout":60}`)), 201)
	same(t, "asked", r.fake.was(), "fork 100 1m0s")
}

func TestSnapshotsAreMadeListedAndDeleted(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	snap := store.Snapshot{
		ID: string(sandbox.NewID()), SandboxID: idOf(id), TemplateID: "tpl1", Alias: "base", Kind: store.SnapshotMemory,
		SizeBytes: 12345, Created: time.Unix(1_700_000_000, 123456789),
	}
	r.fake.snap = &snap
	r.fake.was()
	for _, c := range []struct {
		body, asked string
		names       []any
	}{
		{"", `snapshot ""`, []any{}},
		{"{}", `snapshot ""`, []any{}},
		{`{"name":""}`, `snapshot ""`, []any{}},
		{`{"name":"Mine"}`, `snapshot "mine"`, []any{"default/mine:default"}},
		{`{"name":"default/mine:default"}`, `snapshot "mine"`, []any{"default/mine:default"}},
		{`{"name":"mine:v1.2"}`, `snapshot "mine:v1.2"`, []any{"default/mine:v1.2"}},
	} {
		got := r.object(r.do("POST", "/sandboxes/"+id+"/snapshots", strings.NewReader(c.body)), 201)
		same(t, c.body, r.fake.was(), c.asked)
		same(t, "snapshot", got, map[string]any{
			"snapshotID": snap.ID + ":default", "names": c.names, "sandboxID": id, "templateID": "tpl1", "alias": "base",
			"kind": "memory", "sizeBytes": 12345.0, "createdAt": "2023-11-14T22:13:20.123456Z",
		})
	}

	for ref, want := range map[string]string{
		snap.ID: snap.ID, snap.ID + "%3Adefault": snap.ID, "mine": "mine", "default%2Fmine%3Adefault": "mine", "default%2Fmine%3Av2": "mine:v2",
	} {
		r.empty(r.do("DELETE", "/templates/"+ref, nil))
		same(t, ref, r.fake.was(), fmt.Sprintf("delete %q", want))
	}
	r.fake.err = sandbox.Errorf(sandbox.ErrConflict, "in use")
	r.fails(r.do("DELETE", "/templates/mine", nil), 409, "in use")
	r.fake.err = sandbox.ErrNotFound
	r.fails(r.do("DELETE", "/templates/mine", nil), 404, `snapshot "mine" not found`)
}

func TestPagesOfSnapshotsFollowEachOther(t *testing.T) {
	r := newRig(t)
	for i := range 3 {
		r.fake.snaps = append(r.fake.snaps, store.Snapshot{ID: string(sandbox.NewID()), Created: time.Unix(1_700_000_000-int64(i), 5)})
	}
	a := r.do("GET", "/snapshots?limit=2&sandboxID=aaaaaaaaaaaaaaaaaaaa-00000000&name=default%2FMine%3Adefault", nil)
	same(t, "page", len(r.list(a, 200)), 2)
	ready := []store.SnapshotState{store.SnapshotReady}
	same(t, "filter", r.fake.filter, store.SnapshotFilter{SandboxID: "aaaaaaaaaaaaaaaaaaaa", Ref: "mine", States: ready, Limit: 3})
	last := r.fake.snaps[1]
	r.fake.snaps = r.fake.snaps[2:]
	a = r.do("GET", "/snapshots?nextToken="+a.Header.Get("X-Next-Token"), nil)
	same(t, "page", len(r.list(a, 200)), 1)
	same(t, "next", a.Header.Get("X-Next-Token"), "")
	same(t, "filter", r.fake.filter, store.SnapshotFilter{
		States: ready, Limit: 101, After: &store.SnapshotCursor{Created: last.Created.UTC(), ID: last.ID},
	})
	r.fake.was()
	for _, nobody := range []string{"sandboxID=nope", "name=others%2Fmine", "name=a+b"} {
		same(t, nobody, len(r.list(r.do("GET", "/snapshots?"+nobody, nil), 200)), 0)
	}
	same(t, "asked", r.fake.was(), "")
}
