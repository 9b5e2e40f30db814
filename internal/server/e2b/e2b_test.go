package e2b_test

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/controlplane/controlplanetest"
	"github.com/wrenn/wrenn/internal/server/e2b"
	"github.com/wrenn/wrenn/internal/store"
	"github.com/wrenn/wrenn/internal/store/sqlite"
)

const (
	key        = "e2b_00ff"
	foreignKey = "e2b_11ee" // of another team
)

// rig is the API before a real control plane and store, and a host agent in memory.
type rig struct {
	t     *testing.T
	plane *controlplane.ControlPlane
	fake  *lifecyclePlane
	agent *controlplanetest.Agent
	store store.Store
	url   string
	log   *bytes.Buffer
}

func newRig(t *testing.T) *rig {
	t.Helper()
	db, err := sqlite.Open(t.Context(), filepath.Join(t.TempDir(), "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { db.Close() })
	r := &rig{t: t, agent: controlplanetest.NewAgent(t), store: db, log: &bytes.Buffer{}}
	log := slog.New(slog.NewTextHandler(r.log, nil))
	r.plane = controlplane.New(controlplane.Config{Store: db, Agent: r.agent.Client, HostID: "h1", MasterKey: []byte("m"), Log: log})
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	_, err = r.plane.Bootstrap(ctx, key)
	must(err)
	must(db.Teams().Insert(ctx, store.Team{ID: "t2", Slug: "others", Name: "Others", Created: time.Now()}))
	must(db.APIKeys().Insert(ctx, store.APIKey{ID: "k2", TeamID: "t2", Hash: hash(foreignKey), Created: time.Now()}))
	must(r.plane.PutTemplate(ctx, store.Template{ID: "tpl1", Alias: "base", Public: true, BuildID: "b1", CPUs: 2, MemoryMiB: 512, DiskMiB: 1024}))
	must(r.plane.PutTemplate(ctx, store.Template{ID: "tpl2", Alias: "secret", TeamID: "t2", BuildID: "b2"}))
	r.fake = &lifecyclePlane{ControlPlane: r.plane}
	srv := httptest.NewServer(e2b.New(e2b.Config{ControlPlane: r.fake, Log: log}))
	t.Cleanup(srv.Close)
	r.url = srv.URL
	return r
}

// answer is a response with its body read.
type answer struct {
	*http.Response
	body []byte
}

// do sends a request with the team's key; extra headers come in pairs.
func (r *rig) do(method, path string, body any, headers ...string) answer {
	r.t.Helper()
	var payload io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		payload = strings.NewReader(b)
	case io.Reader: // is sent in chunks
		payload = b
	default:
		text, err := json.Marshal(b)
		if err != nil {
			r.t.Fatal(err)
		}
		payload = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.url+path, payload)
	if err != nil {
		r.t.Fatal(err)
	}
	req.Header.Set("X-API-Key", key)
	for i := 0; i < len(headers); i += 2 {
		if req.Header.Del(headers[i]); headers[i+1] != "" {
			req.Header.Set(headers[i], headers[i+1])
		}
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		r.t.Fatal(err)
	}
	return answer{resp, text}
}

// object is the body of an answer with that status.
func (r *rig) object(a answer, status int) map[string]any {
	r.t.Helper()
	var v map[string]any
	r.read(a, status, &v)
	return v
}

func (r *rig) list(a answer, status int) []map[string]any {
	r.t.Helper()
	var v []map[string]any
	r.read(a, status, &v)
	if v == nil {
		r.t.Errorf("body is %s, want an array", a.body)
	}
	return v
}

func (r *rig) read(a answer, status int, v any) {
	r.t.Helper()
	if a.StatusCode != status {
		r.t.Fatalf("%s %s: status %d, want %d: %s", a.Request.Method, a.Request.URL.Path, a.StatusCode, status, a.body)
	}
	if err := json.Unmarshal(a.body, v); err != nil {
		r.t.Fatalf("%s: %v", a.body, err)
	}
}

// fails checks status and shape of a failure and returns its message.
func (r *rig) fails(a answer, status int, parts ...string) string {
	r.t.Helper()
	var e struct {
		Code    int     `json:"code"`
		Message *string `json:"message"`
	}
	if a.StatusCode != status {
		r.t.Errorf("%s %s: status %d, want %d: %s", a.Request.Method, a.Request.URL, a.StatusCode, status, a.body)
		return ""
	}
	if err := json.Unmarshal(a.body, &e); err != nil || e.Code != status || e.Message == nil || *e.Message == "" {
		r.t.Errorf("%s %s: body is not the shape of an error: %s", a.Request.Method, a.Request.URL, a.body)
		return ""
	}
	if ct := a.Header.Get("Content-Type"); ct != "application/json; charset=utf-8" {
		r.t.Errorf("content type is %q", ct)
	}
	for _, p := range parts {
		if !strings.Contains(*e.Message, p) {
			r.t.Errorf("%s %s: message %q does not say %q", a.Request.Method, a.Request.URL, *e.Message, p)
		}
	}
	return *e.Message
}

// empty checks for a 204, which has no body and no length.
func (r *rig) empty(a answer) {
	r.t.Helper()
	if a.StatusCode != 204 || len(a.body) != 0 || a.TransferEncoding != nil {
		r.t.Errorf("%s %s: status %d, body %q, want an empty 204", a.Request.Method, a.Request.URL, a.StatusCode, a.body)
	}
}

func (r *rig) create(body map[string]any) map[string]any {
	r.t.Helper()
	if body["templateID"] == nil {
		body["templateID"] = "base"
	}
	return r.object(r.do("POST", "/v2/sandboxes", body), 201)
}

func keys(m map[string]any) []string {
	var names []string
	for k := range m {
		names = append(names, k)
	}
	slices.Sort(names)
	return names
}

func same[T any](t *testing.T, what string, got, want T) {
	t.Helper()
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func lives(t *testing.T, detail map[string]any) time.Duration {
	t.Helper()
	end, err := time.Parse(time.RFC3339Nano, detail["endAt"].(string))
	if err != nil {
		t.Fatal(err)
	}
	return time.Until(end).Round(time.Second)
}

func TestBothGenerationsCreate(t *testing.T) {
	r := newRig(t)
	base := []string{"alias", "clientID", "domain", "envdVersion", "sandboxID", "templateID"}
	secured := append([]string{"alias", "clientID", "domain", "envdAccessToken"}, "envdVersion", "sandboxID", "templateID")
	for _, c := range []struct {
		name, path, body string
		fields           []string
		lives            time.Duration
	}{
		{"v2 as the JS SDK sends it", "/v2/sandboxes", `{"templateID":"base"}`, secured, 300 * time.Second},
		{"v2 as the Python SDK sends it", "/v2/sandboxes", `{"templateID":"base","metadata":{},"envVars":{},"timeout":60}`, secured, time.Minute},
		{"v2 cannot be unsecured", "/v2/sandboxes", `{"templateID":"base","secure":false}`, secured, 300 * time.Second},
		{"v1 with defaults", "/sandboxes", `{"templateID":"tpl1"}`, base, 15 * time.Second},
		{"v1 secured", "/sandboxes", `{"templateID":"default/base","secure":true,"timeout":20}`, secured, 20 * time.Second},
		{"settings that ask for nothing", "/v2/sandboxes", `{"templateID":"base:default","autoPause":false,"autoPauseMemory":true,"autoResume":{"enabled":false},
			"mcp":{},"iam":{"tokens":{}},"volumeMounts":[],"network":{"allowOut":[],"denyOut":null,"allowPublicTraffic":true,"rules":{}},"unknown":[{"x":1}],"timeout":null}`, secured, 300 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := r.object(r.do("POST", c.path, c.body), 201)
			same(t, "fields", keys(got), c.fields)
			same(t, "template", got["templateID"], any("tpl1"))
			same(t, "version", got["envdVersion"], any("0.6.99"))
			same(t, "domain", got["domain"], nil)
			detail := r.object(r.do("GET", "/sandboxes/"+got["sandboxID"].(string), nil), 200)
			if d := lives(t, detail); d < c.lives-time.Second || d > c.lives {
				t.Errorf("lives for %v, want %v", d, c.lives)
			}
		})
	}
}

func TestACreateReachesTheHostAsItWasMeant(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{"envVars": map[string]string{"A": "b=c\nd", "ü": ""}, "allow_internet_access": false})["sandboxID"].(string)
	req := r.agent.Created(idOf(id))
	same(t, "environment", req.EnvVars, map[string]string{"A": "b=c\nd", "ü": ""})
	same(t, "internet", req.AllowInternetAccess, false)
	if req.AccessToken == "" || req.AccessToken != r.plane.AccessToken(idOf(id)) {
		t.Error("the token is not the one that was shown")
	}
	id = r.create(map[string]any{"network": map[string]any{"denyOut": []string{"0.0.0.0/0"}}})["sandboxID"].(string)
	same(t, "internet", r.agent.Created(idOf(id)).AllowInternetAccess, false)
	id = r.object(r.do("POST", "/sandboxes", io.MultiReader(strings.NewReader(`{"templateID":`), strings.NewReader(`"base"}`))), 201)["sandboxID"].(string)
	same(t, "internet", r.agent.Created(idOf(id)).AllowInternetAccess, true)
	same(t, "token of an unsecured one", r.agent.Created(idOf(id)).AccessToken, "")
}

func TestGetShowsEveryField(t *testing.T) {
	r := newRig(t)
	created := r.create(map[string]any{"metadata": map[string]string{"a": "b"}})
	id := created["sandboxID"].(string)
	for _, path := range []string{id, id + "-00000000", "%6" + string("0123456789abcdef"[id[0]&15]) + id[1:]} {
		if path[0] == '%' && id[0]>>4 != 6 {
			continue // that escape is of the letters a to o
		}
		got := r.object(r.do("GET", "/sandboxes/"+path, nil), 200)
		same(t, "fields", keys(got), []string{
			"alias", "allowInternetAccess", "clientID", "cpuCount", "diskSizeMB", "domain", "endAt", "envdAccessToken", "envdVersion",
			"lifecycle", "memoryMB", "metadata", "network", "sandboxID", "startedAt", "state", "templateID",
		})
		same(t, "network", got["network"], any(map[string]any{"allowPublicTraffic": true}))
		same(t, "metadata", got["metadata"], any(map[string]any{"a": "b"}))
		same(t, "state", got["state"], any("running"))
		same(t, "token", got["envdAccessToken"], created["envdAccessToken"])
		same(t, "lifecycle", got["lifecycle"], any(map[string]any{"autoResume": false, "onTimeout": "kill"}))
		same(t, "cpus", got["cpuCount"], any(2.0))
	}
}

func TestKillIsFollowedByNotFound(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	r.empty(r.do("DELETE", "/sandboxes/"+id, nil))
	r.fails(r.do("DELETE", "/sandboxes/"+id, nil), 404)
	r.fails(r.do("GET", "/sandboxes/"+id, nil), 404, "ended at", "killed")
	r.fails(r.do("POST", "/v2/sandboxes/"+id+"/connect", nil), 404)
	r.fails(r.do("POST", "/sandboxes/"+id+"/timeout", `{"timeout":5}`), 404)
}

func TestTimesToLiveAreSetAndExtended(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{"timeout": 100})["sandboxID"].(string)
	path := "/sandboxes/" + id
	expect := func(d time.Duration) {
		t.Helper()
		if got := lives(t, r.object(r.do("GET", path, nil), 200)); got < d-2*time.Second || got > d {
			t.Errorf("lives for %v, want %v", got, d)
		}
	}
	r.empty(r.do("POST", path+"/timeout", `{"timeout":50}`))
	expect(50 * time.Second)
	r.empty(r.do("POST", path+"/refreshes", `{"duration":20}`))
	expect(50 * time.Second)
	r.empty(r.do("POST", path+"/refreshes", nil))
	expect(50 * time.Second)
	r.empty(r.do("POST", path+"/refreshes", `{"duration":200}`))
	expect(200 * time.Second)
	same(t, "connected", r.object(r.do("POST", path+"/connect", `{"timeout":10}`), 200)["sandboxID"], any(id))
	expect(200 * time.Second)
	r.object(r.do("POST", "/v2"+path+"/connect", nil), 200) // no body: 300 s
	expect(300 * time.Second)
	got := r.object(r.do("POST", "/v2"+path+"/connect", strings.NewReader(`{"timeout":400,"memory":false}`)), 200)
	if got["envdAccessToken"] == nil {
		t.Error("connect shows no token")
	}
	expect(400 * time.Second)
	r.empty(r.do("POST", path+"/timeout", `{"timeout":0}`))
}

func TestAListHasWhatItsFiltersPick(t *testing.T) {
	r := newRig(t)
	var ids []string
	for _, m := range []map[string]string{{"a": "b c"}, {"a": "b c", "k&=": "v%20+/ü"}, {}} {
		ids = append(ids, r.create(map[string]any{"metadata": m})["sandboxID"].(string))
	}
	middle := r.object(r.do("GET", "/sandboxes/"+ids[1], nil), 200)["startedAt"].(string)
	newest := []string{ids[2], ids[1], ids[0]}
	for _, c := range []struct {
		name, query string
		want        []string
		total       string
	}{
		{"nothing", "", newest, "3"},
		{"one pair as SDKs send it", "metadata=a%3Db%252520c", []string{ids[1], ids[0]}, "2"},
		{"odd pair as SDKs send it", "metadata=k%252526%25253D%3Dv%25252520%25252B%25252F%2525C3%2525BC", []string{ids[1]}, "1"},
		{"no such pair", "metadata=a%3Db", nil, "0"},
		{"running", "state=running", newest, "3"},
		{"running or paused", "state=running,paused", newest, "3"},
		{"paused", "state=paused", nil, ""},
		{"oldest first", "order=asc", ids, "3"},
		{"alias", "template=base", newest, "3"},
		{"template id", "template=tpl1", newest, "3"},
		{"another template", "template=desktop", nil, "0"},
		{"started at or after", "startedAfter=" + middle, []string{ids[2], ids[1]}, "2"},
		{"in another zone", "startedAfter=2000-01-01T00:00:00+02:00", newest, "3"},
	} {
		a := r.do("GET", "/v2/sandboxes?"+c.query, nil)
		var got []string
		for _, b := range r.list(a, 200) {
			got = append(got, b["sandboxID"].(string))
		}
		same(t, c.name, got, c.want)
		same(t, c.name+": total", a.Header.Get("X-Total-Running"), c.total)
		same(t, c.name+": next", a.Header.Get("X-Next-Token"), "")
	}
	got := r.list(r.do("GET", "/sandboxes?metadata=a%3Db%252520c", nil), 200)
	same(t, "v1", len(got), 2)
	same(t, "fields", keys(got[0]), []string{
		"alias", "clientID", "cpuCount", "diskSizeMB", "endAt", "envdVersion", "memoryMB", "metadata", "sandboxID", "startedAt", "state", "templateID",
	})
	same(t, "foreign", len(r.list(r.do("GET", "/v2/sandboxes", nil, "X-API-Key", foreignKey), 200)), 0)
}

func TestPagesOfAListFollowEachOther(t *testing.T) {
	r := newRig(t)
	want := make(map[string]bool)
	for range 5 {
		want[r.create(map[string]any{})["sandboxID"].(string)] = true
	}
	token, pages := "", 0
	for {
		a := r.do("GET", "/v2/sandboxes?limit=2&order=asc&nextToken="+token, nil)
		for _, b := range r.list(a, 200) {
			if !want[b["sandboxID"].(string)] {
				t.Error("a sandbox is on two pages")
			}
			delete(want, b["sandboxID"].(string))
		}
		same(t, "total", a.Header.Get("X-Total-Running"), "5")
		pages++
		if token = a.Header.Get("X-Next-Token"); token == "" {
			break
		}
	}
	same(t, "pages", pages, 3)
	same(t, "left out", len(want), 0)
}

func TestMetricsHaveEveryField(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	all := r.list(r.do("GET", "/sandboxes/"+id+"/metrics", nil), 200)
	same(t, "points", len(all), 3)
	same(t, "fields", keys(all[0]), []string{
		"cpuCount", "cpuUsedPct", "diskTotal", "diskUsed", "memCache", "memTotal", "memUsed", "timestamp", "timestampUnix",
	})
	same(t, "bounded", len(r.list(r.do("GET", "/sandboxes/"+id+"/metrics?start=1700000005&end=1700000005", nil), 200)), 1)
	same(t, "none", len(r.list(r.do("GET", "/sandboxes/"+id+"/metrics?start=1800000000", nil), 200)), 0)
	many := r.object(r.do("GET", "/sandboxes/metrics?sandbox_ids="+id+",aaaaaaaaaaaaaaaaaaaa,x", nil), 200)["sandboxes"].(map[string]any)
	same(t, "of many", keys(many), []string{id})
	same(t, "the last", many[id].(map[string]any)["timestampUnix"], any(1700000010.0))
	none := r.object(r.do("GET", "/sandboxes/metrics?sandbox_ids="+id, nil, "X-API-Key", foreignKey), 200)
	same(t, "foreign", none, map[string]any{"sandboxes": map[string]any{}})
}

func TestLogsComeInBothShapes(t *testing.T) {
	r := newRig(t)
	id := r.create(map[string]any{})["sandboxID"].(string)
	r.agent.Log(idOf(id), "info", "first")
	r.agent.Log(idOf(id), "strange", "second")
	r.agent.Log(idOf(id), "error", "third")
	v1 := r.object(r.do("GET", "/sandboxes/"+id+"/logs?start=5&limit=100000", nil), 200)
	same(t, "fields", keys(v1), []string{"logEntries", "logs"})
	first := v1["logs"].([]any)[0].(map[string]any)
	var line map[string]string
	if err := json.Unmarshal([]byte(first["line"].(string)), &line); err != nil {
		t.Fatal(err)
	}
	same(t, "level", line["level"], "info")
	same(t, "message", line["message"], "first")
	same(t, "logger", line["logger"], "envd")
	messages := func(query string) (out []string) {
		t.Helper()
		for _, e := range r.object(r.do("GET", "/v2/sandboxes/"+id+"/logs"+query, nil), 200)["logs"].([]any) {
			same(t, "fields", keys(e.(map[string]any)), []string{"fields", "level", "message", "timestamp"})
			out = append(out, e.(map[string]any)["message"].(string))
		}
		return out
	}
	same(t, "newest first", messages(""), []string{"third", "second", "first"})
	same(t, "forward", messages("?direction=forward&limit=2"), []string{"first", "second"})
	same(t, "from long ago on", messages("?direction=forward&cursor=1"), []string{"first", "second", "third"})
	same(t, "up to long ago", messages("?direction=backward&cursor=1"), nil)
	same(t, "level", messages("?level=warn"), []string{"third"})
	same(t, "search", messages("?search=ir"), []string{"third", "first"})
	r.empty(r.do("DELETE", "/sandboxes/"+id, nil))
	if got := messages("?limit=1"); len(got) != 1 || !strings.Contains(got[0], "killed") {
		t.Errorf("the log of an ended sandbox closes with %v", got)
	}
}

func TestTemplatesAreShown(t *testing.T) {
	r := newRig(t)
	for _, path := range []string{"/templates", "/v2/templates?limit=100", "/templates?teamID=default"} {
		list := r.list(r.do("GET", path, nil), 200)
		same(t, "templates", len(list), 1)
		same(t, "fields", keys(list[0]), []string{
			"aliases", "buildCount", "buildID", "buildStatus", "cpuCount", "createdAt", "createdBy", "diskSizeMB", "envdVersion",
			"lastSpawnedAt", "memoryMB", "names", "public", "spawnCount", "templateID", "updatedAt",
		})
	}
	for _, ref := range []string{"tpl1", "base", "default%2Fbase%3Adefault"} {
		got := r.object(r.do("GET", "/templates/"+ref, nil), 200)
		same(t, "builds", len(got["builds"].([]any)), 1)
	}
	same(t, "alias", r.object(r.do("GET", "/templates/aliases/base", nil), 200), map[string]any{"templateID": "tpl1", "public": true})
	r.fails(r.do("GET", "/templates/aliases/nope", nil), 404, "nope")
	r.fails(r.do("GET", "/templates/aliases/secret", nil), 403)
	r.fails(r.do("GET", "/templates/secret", nil), 403)
	r.fails(r.do("GET", "/templates?teamID=others", nil), 403)
	same(t, "theirs", len(r.list(r.do("GET", "/templates", nil, "X-API-Key", foreignKey), 200)), 2)
}

func TestAKeyIsNeeded(t *testing.T) {
	r := newRig(t)
	r.fails(r.do("GET", "/sandboxes", nil, "X-API-Key", ""), 401, "missing")
	r.fails(r.do("GET", "/sandboxes", nil, "X-API-Key", "e2b_bad"), 401)
	r.fails(r.do("POST", "/sandboxes/x/pause", nil, "X-API-Key", "e2b_bad"), 401)
	r.fails(r.do("GET", "/sandboxes", nil, "X-API-Key", "", "Authorization", "Basic "+key), 401)
	r.list(r.do("GET", "/sandboxes", nil, "X-API-Key", "", "Authorization", "Bearer "+key), 200)
	r.empty(r.do("GET", "/health", nil, "X-API-Key", ""))
}

func TestPagesOfOtherOriginsMayUseTheAPI(t *testing.T) {
	r := newRig(t)
	a := r.do("OPTIONS", "/v2/sandboxes", nil, "X-API-Key", "", "Origin", "https://example.com",
		"Access-Control-Request-Method", "POST", "Access-Control-Request-Headers", "x-api-key,content-type,lang,sdk_runtime")
	r.empty(a)
	same(t, "origin", a.Header.Get("Access-Control-Allow-Origin"), "*")
	for _, h := range []string{"X-API-Key", "Content-Type", "lang_version", "package_version", "publisher", "sdk_runtime", "system", "browser"} {
		if !strings.Contains(a.Header.Get("Access-Control-Allow-Headers"), h) {
			t.Errorf("header %s is not allowed", h)
		}
	}
	a = r.do("GET", "/v2/sandboxes", nil)
	for _, h := range []string{"X-Next-Token", "X-Total-Running", "Retry-After"} {
		if !strings.Contains(a.Header.Get("Access-Control-Expose-Headers"), h) {
			t.Errorf("header %s is not exposed", h)
		}
	}
}

func TestInternalsStayInTheLog(t *testing.T) {
	r := newRig(t)
	r.store.Close()
	r.fails(r.do("GET", "/sandboxes", nil), 500, "internal error")
	if !strings.Contains(r.log.String(), "closed") {
		t.Errorf("the log does not say what happened: %s", r.log)
	}
}

// broken is a control plane that has a bug.
type broken struct{ e2b.ControlPlane }

func (broken) Authenticate(context.Context, string) (store.Team, error) { panic("secret detail") }

func TestAPanicIsA500(t *testing.T) {
	r := newRig(t)
	srv := httptest.NewServer(e2b.New(e2b.Config{ControlPlane: broken{r.plane}, Log: slog.New(slog.NewTextHandler(r.log, nil))}))
	defer srv.Close()
	r.url = srv.URL
	if text := r.fails(r.do("GET", "/sandboxes", nil), 500); strings.Contains(text, "secret") {
		t.Errorf("it shows %q", text)
	}
	if !strings.Contains(r.log.String(), "secret detail") {
		t.Error("the log does not have it")
	}
}
