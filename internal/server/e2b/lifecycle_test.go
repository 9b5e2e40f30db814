package e2b_test

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/server/e2b"
	"github.com/wrenn/wrenn/internal/store"
)

// lifecyclePlane is a control plane that notes what it is asked about pauses and
// forks. While it has an answer for a test, that is what it answers.
type lifecyclePlane struct {
	e2b.ControlPlane
	asked  []string
	err    error
	box    *sandbox.Sandbox
	forks  []controlplane.Forked
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

func (p *lifecyclePlane) Snapshots(ctx context.Context, team string, f store.SnapshotFilter) ([]store.Snapshot, error) {
	p.note("snapshots")
	p.filter = f
	if p.snaps == nil {
		return p.ControlPlane.Snapshots(ctx, team, f)
	}
	return p.snaps, p.err
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
			b.SourceID, b.Spec.AutoResume = "parent", true
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

func TestSnapshotsAreMadeUsedAndDeleted(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	path := "/sandboxes/" + id + "/snapshots"
	got := r.object(r.do("POST", path, nil), 201)
	same(t, "fields", keys(got), []string{"alias", "createdAt", "kind", "names", "sandboxID", "sizeBytes", "snapshotID", "templateID"})
	plain := got["snapshotID"].(string)
	same(t, "names", got["names"], any([]any{}))
	same(t, "sandbox", got["sandboxID"], any(id))
	same(t, "kind", got["kind"], any("memory"))
	for body, name := range map[string]string{
		`{"name":"Mine"}`:                 "default/mine:default",
		`{"name":"default/mine:default"}`: "default/mine:default",
		`{"name":"mine:v1.2"}`:            "default/mine:v1.2",
	} {
		same(t, body, r.object(r.do("POST", path, strings.NewReader(body)), 201)["names"], any([]any{name}))
	}
	list := r.list(r.do("GET", "/snapshots?sandboxID="+id, nil), 200)
	same(t, "all", len(list), 4)
	same(t, "the oldest", list[3], got)
	for query, want := range map[string]int{
		"name=mine": 2, "name=default%2FMINE%3Adefault": 2, "name=mine%3Av1.2": 1, "name=mine%3Av2": 0,
		"name=" + strings.TrimSuffix(plain, ":default"): 1, "name=" + url.QueryEscape(plain): 1, "sandboxID=aaaaaaaaaaaaaaaaaaaa": 0,
	} {
		same(t, query, len(r.list(r.do("GET", "/snapshots?"+query, nil), 200)), want)
	}
	same(t, "foreign", len(r.list(r.do("GET", "/snapshots", nil, "X-API-Key", foreignKey), 200)), 0)

	for _, ref := range []string{plain, strings.TrimSuffix(plain, ":default"), "mine", "default/mine:v1.2"} {
		child := r.create(map[string]any{"templateID": ref})
		if child["sandboxID"] == id || child["envdAccessToken"] == nil {
			t.Errorf("created from %s: %v", ref, child)
		}
		same(t, "those of it", len(r.list(r.do("GET", "/v2/sandboxes?template="+child["templateID"].(string), nil), 200)) > 0, true)
	}
	same(t, "the template of its children", len(r.list(r.do("GET", "/v2/sandboxes?template="+url.QueryEscape(plain), nil), 200)), 2)
	r.fails(r.do("POST", "/v2/sandboxes", map[string]any{"templateID": plain}, "X-API-Key", foreignKey), 404)
	r.fails(r.do("DELETE", "/templates/"+url.PathEscape(plain), nil, "X-API-Key", foreignKey), 404)

	r.empty(r.do("DELETE", "/sandboxes/"+id, nil)) // snapshots stay
	for _, ref := range []string{plain, "mine", "default/mine:default", "mine:v1.2"} {
		r.empty(r.do("DELETE", "/templates/"+url.PathEscape(ref), nil))
	}
	r.fails(r.do("DELETE", "/templates/"+url.PathEscape(plain), nil), 404, "not found")
	same(t, "left", len(r.list(r.do("GET", "/snapshots", nil), 200)), 0)
	same(t, "images left", r.agent.Images(), nil)
}

func TestASandboxIsPausedAndResumed(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	path := "/sandboxes/" + id
	state := func() any { return r.object(r.do("GET", path, nil), 200)["state"] }
	r.object(r.do("POST", path+"/connect", `{"timeout":1}`), 200)
	r.empty(r.do("POST", path+"/pause", `{"memory":true}`))
	same(t, "state", state(), any("paused"))
	r.fails(r.do("POST", path+"/pause", nil), 409, "paused")
	r.fails(r.do("POST", path+"/timeout", `{"timeout":5}`), 409, "paused")
	same(t, "resumed", r.object(r.do("POST", "/v2"+path+"/connect", nil), 201)["sandboxID"], any(id))
	same(t, "state", state(), any("running"))
	r.fails(r.do("POST", path+"/resume", nil), 409, "running")

	r.empty(r.do("POST", path+"/pause", `{"memory":false}`))
	r.object(r.do("POST", path+"/resume", `{"timeout":40,"autoPause":true}`), 201)
	detail := r.object(r.do("GET", path, nil), 200)
	same(t, "lifecycle", detail["lifecycle"], any(map[string]any{"autoResume": false, "onTimeout": "pause"}))
	if d := lives(t, detail); d < 38*time.Second || d > 40*time.Second {
		t.Errorf("lives for %v, want 40 s", d)
	}
	forks := r.list(r.do("POST", path+"/fork", strings.NewReader(`{"count":3}`)), 201)
	same(t, "forks", len(forks), 3)
	for _, f := range forks {
		if box, _ := f["sandbox"].(map[string]any); box == nil || box["sandboxID"] == id {
			t.Errorf("a fork is %v", f)
		}
	}
	r.empty(r.do("POST", path+"/pause", nil))
	r.empty(r.do("DELETE", path, nil))
	r.fails(r.do("POST", "/v2"+path+"/connect", nil), 404, "killed")
	r.fails(r.do("POST", path+"/pause", nil), 404, "killed")
	r.fails(r.do("POST", path+"/fork", nil), 404, "killed")
	r.fails(r.do("POST", path+"/snapshots", "{}"), 404, "killed")
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
