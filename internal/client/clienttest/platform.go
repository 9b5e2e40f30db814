// Package clienttest is a platform for tests of clients: a small control API, and
// for each sandbox a real guest agent on the loopback whose programs run on the
// test's own machine. Nothing is isolated.
package clienttest

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/api/proto/process"
	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/envd"
	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// APIKey is the key that the platform accepts.
const APIKey = "e2b_0123456789abcdef0123456789abcdef01234567"

// Platform serves control API and data plane on one port.
type Platform struct {
	URL      string
	PageSize int // of lists; zero: 100

	t         testing.TB
	ports     *proxy.Proxy // to the ports of the sandboxes, which are this machine's
	open      atomic.Int32 // requests to them
	mu        sync.Mutex
	sandboxes map[string]*guest
	snapshots []client.Snapshot // newest first
	events    map[string][]client.Event
	killed    []string
	requests  []string // "METHOD path body" of the control API
}

// guest is one sandbox.
type guest struct {
	info  client.Info
	url   *url.URL
	proxy *httputil.ReverseProxy
	stop  func()

	awake context.Context // ends when it is paused, and its streams with it
	sleep func()
}

// New starts a platform that ends with the test.
func New(t testing.TB) *Platform {
	p := &Platform{t: t, sandboxes: make(map[string]*guest), events: make(map[string][]client.Event)}
	p.ports = proxy.New(proxy.Config{Resolver: p})
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v2/sandboxes", p.create)
	mux.HandleFunc("GET /v2/sandboxes", p.list)
	mux.HandleFunc("GET /sandboxes/{id}", p.get)
	mux.HandleFunc("DELETE /sandboxes/{id}", p.kill)
	mux.HandleFunc("POST /sandboxes/{id}/timeout", p.timeout)
	mux.HandleFunc("POST /sandboxes/{id}/refreshes", p.timeout)
	mux.HandleFunc("POST /sandboxes/{id}/preview-links", p.previewLink)
	mux.HandleFunc("POST /sandboxes/{id}/pause", p.pause)
	mux.HandleFunc("POST /v2/sandboxes/{id}/connect", p.connect)
	mux.HandleFunc("POST /sandboxes/{id}/fork", p.fork)
	mux.HandleFunc("POST /sandboxes/{id}/snapshots", p.snapshot)
	mux.HandleFunc("GET /snapshots", p.listSnapshots)
	mux.HandleFunc("DELETE /templates/{ref}", p.deleteSnapshot)
	mux.HandleFunc("GET /sandboxes/{id}/events", p.listEvents)
	mux.HandleFunc("GET /events", p.listAllEvents)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.Header.Get("E2b-Sandbox-Port") {
		case "":
		case strconv.Itoa(proxy.AgentPort):
			p.forward(w, r)
			return
		default:
			p.open.Add(1)
			defer p.open.Add(-1)
			p.ports.ServeHTTP(w, r)
			return
		}
		body, _ := io.ReadAll(r.Body) // what is missing is for the handler to complain about
		r.Body = io.NopCloser(bytes.NewReader(body))
		p.mu.Lock()
		p.requests = append(p.requests, strings.TrimSpace(r.Method+" "+r.URL.RequestURI()+" "+string(body)))
		p.mu.Unlock()
		if r.Header.Get("X-API-Key") != APIKey {
			fail(w, http.StatusUnauthorized, "invalid API key")
			return
		}
		mux.ServeHTTP(w, r)
	}))
	p.URL = server.URL
	t.Cleanup(func() {
		p.KillAll()
		p.ports.Close()
		server.CloseClientConnections()
		server.Close()
	})
	return p
}

// Resolve implements proxy.Resolver.
func (p *Platform) Resolve(_ context.Context, id string) (proxy.Target, error) {
	if !p.runs(id) {
		return proxy.Target{}, sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s not found", id)
	}
	return proxy.Target{SandboxID: id, Addr: netip.MustParseAddr("127.0.0.1")}, nil
}

// AwaitPort waits until so many requests to ports of sandboxes are under way.
func (p *Platform) AwaitPort(n int) {
	p.t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for p.open.Load() < int32(n) {
		if time.Now().After(deadline) {
			p.t.Fatalf("%d requests to ports are under way, want %d", p.open.Load(), n)
		}
		time.Sleep(time.Millisecond) // between two looks
	}
}

// Client returns a client of the platform.
func (p *Platform) Client() *client.Client {
	c, err := client.New(client.Config{APIURL: p.URL, APIKey: APIKey})
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(c.Close)
	return c
}

// Running returns the ids of the sandboxes there are.
func (p *Platform) Running() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := []string{}
	for id := range p.sandboxes {
		ids = append(ids, id)
	}
	return ids
}

// Killed returns the ids of the sandboxes that were ended by a client.
func (p *Platform) Killed() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.killed)
}

// Requests returns what the control API was asked: "METHOD path?query body".
func (p *Platform) Requests() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.requests)
}

// KillAll ends all sandboxes as if their time was up.
func (p *Platform) KillAll() {
	for _, id := range p.Running() {
		p.remove(id)
	}
}

func (p *Platform) remove(id string) bool {
	p.mu.Lock()
	g := p.sandboxes[id]
	delete(p.sandboxes, id)
	p.mu.Unlock()
	if g == nil {
		return false
	}
	p.ports.Evict(id)
	g.stop()
	return true
}

func (p *Platform) create(w http.ResponseWriter, r *http.Request) {
	var body struct {
		TemplateID string            `json:"templateID"`
		Timeout    int64             `json:"timeout"`
		Metadata   map[string]string `json:"metadata"`
		EnvVars    map[string]string `json:"envVars"`
		Network    struct {
			AllowPublicTraffic *bool
			MaskRequestHost    string
		} `json:"network"`
		AutoPause  bool `json:"autoPause"`
		AutoResume struct {
			Enabled bool `json:"enabled"`
		} `json:"autoResume"`
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	if body.TemplateID != "base" && !p.hasSnapshot(body.TemplateID) {
		fail(w, http.StatusNotFound, fmt.Sprintf("template '%s' not found", body.TemplateID))
		return
	}
	now := time.Now()
	info := client.Info{
		SandboxID: string(sandbox.NewID()), TemplateID: body.TemplateID, Alias: "base", ClientID: "test",
		State: "running", StartedAt: now, EndAt: now.Add(time.Duration(cmp.Or(body.Timeout, 300)) * time.Second),
		CPUCount: 2, MemoryMB: 512, DiskSizeMB: 1024, Metadata: body.Metadata, EnvdVersion: envd.Version,
		EnvdAccessToken: "token-" + string(sandbox.NewID()), Lifecycle: lifecycle(body.AutoPause, body.AutoResume.Enabled),
	}
	if public := body.Network.AllowPublicTraffic; public != nil && !*public {
		info.TrafficAccessToken = "traffic for " + body.Network.MaskRequestHost
	}
	g, err := startGuest(info, body.EnvVars)
	if err != nil {
		fail(w, http.StatusInternalServerError, err.Error())
		return
	}
	p.add(g, "created")
	answer(w, http.StatusCreated, info)
}

// startGuest starts a guest agent and gives it its token, as a host does.
func startGuest(info client.Info, env map[string]string) (*guest, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	agent := envd.New(envd.Config{})
	go func() {
		defer close(served)
		_ = agent.Serve(ctx, listener)
	}()
	u := &url.URL{Scheme: "http", Host: listener.Addr().String()}
	proxy := httputil.NewSingleHostReverseProxy(u)
	proxy.FlushInterval = -1
	proxy.ErrorLog = log.New(io.Discard, "", 0) // ended sandboxes are part of the tests
	transport := &http.Transport{}
	proxy.Transport = transport
	g := &guest{info: info, url: u, proxy: proxy, stop: func() {
		pids := processes(info, u)
		cancel() // breaks the streams off, rather than have them report the end of a process
		<-served
		transport.CloseIdleConnections()
		for _, pid := range pids {
			_ = syscall.Kill(-pid, syscall.SIGKILL)
		}
	}}
	g.wake()
	body, _ := json.Marshal(map[string]any{"accessToken": info.EnvdAccessToken, "envVars": env})
	resp, err := http.Post(u.String()+"/init", "application/json", bytes.NewReader(body))
	if err != nil {
		g.stop()
		return nil, err
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		g.stop()
		return nil, fmt.Errorf("init: %s", resp.Status)
	}
	return g, nil
}

func (g *guest) wake() { g.awake, g.sleep = context.WithCancel(context.Background()) }

// processes returns the pids of what runs in the sandbox.
func processes(info client.Info, u *url.URL) []int {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := client.New(client.Config{APIURL: u.String()})
	if err != nil {
		return nil
	}
	defer c.Close()
	s := c.Sandbox(info)
	list, err := s.Processes().List(s.Context(ctx, ""), &process.ListRequest{})
	if err != nil {
		return nil
	}
	var pids []int
	for _, running := range list.GetProcesses() {
		pids = append(pids, int(running.GetPid()))
	}
	return pids
}

func (p *Platform) find(id string) *guest {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.sandboxes[id]
}

func (p *Platform) get(w http.ResponseWriter, r *http.Request) {
	g := p.find(r.PathValue("id"))
	if g == nil {
		fail(w, http.StatusNotFound, p.notFound(r.PathValue("id")))
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	answer(w, http.StatusOK, g.info)
}

func (p *Platform) kill(w http.ResponseWriter, r *http.Request) {
	id := r.PathValue("id")
	if !p.remove(id) {
		fail(w, http.StatusNotFound, p.notFound(id))
		return
	}
	p.mu.Lock()
	p.killed = append(p.killed, id)
	p.happened(id, "stopped", "it was killed")
	p.mu.Unlock()
	w.WriteHeader(http.StatusNoContent)
}

// notFound is what the platform says of an id that it has no sandbox for.
func (p *Platform) notFound(id string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	if slices.Contains(p.killed, id) {
		return fmt.Sprintf("sandbox %q not found: it ended: it was killed", id)
	}
	return fmt.Sprintf("sandbox %q not found", id)
}

func (p *Platform) timeout(w http.ResponseWriter, r *http.Request) {
	var body struct{ Timeout, Duration int64 }
	g := p.find(r.PathValue("id"))
	if g == nil {
		fail(w, http.StatusNotFound, "sandbox not found")
		return
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil || body.Timeout+body.Duration <= 0 {
		fail(w, http.StatusBadRequest, "timeout must be positive")
		return
	}
	p.mu.Lock()
	g.info.EndAt = time.Now().Add(time.Duration(body.Timeout+body.Duration) * time.Second)
	p.mu.Unlock()
	w.WriteHeader(http.StatusNoContent)
}

// previewLink makes links that say what was asked for and lead nowhere.
func (p *Platform) previewLink(w http.ResponseWriter, r *http.Request) {
	var body struct{ Port, ExpiresIn int }
	g := p.find(r.PathValue("id"))
	if g == nil {
		fail(w, http.StatusNotFound, p.notFound(r.PathValue("id")))
		return
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	answer(w, http.StatusCreated, client.PreviewLink{
		URL:       fmt.Sprintf("%s/proxy/%s/%d/?seconds=%d", p.URL, g.info.SandboxID, body.Port, body.ExpiresIn),
		ExpiresAt: time.Now().Add(time.Duration(body.ExpiresIn) * time.Second),
	})
}

// list decodes the metadata filter as E2B's servers do: once more than the query.
func (p *Platform) list(w http.ResponseWriter, r *http.Request) {
	filter := map[string]string{}
	raw, err := url.QueryUnescape(r.URL.Query().Get("metadata"))
	for _, pair := range strings.Split(raw, "&") {
		if key, value, ok := strings.Cut(pair, "="); ok && err == nil {
			key, _ = url.QueryUnescape(key)
			value, _ = url.QueryUnescape(value)
			filter[key] = value
		}
	}
	p.mu.Lock()
	all := []client.Info{}
	for _, g := range p.sandboxes {
		matches := true
		for key, value := range filter {
			matches = matches && g.info.Metadata[key] == value
		}
		if matches {
			info := g.info
			info.EnvdAccessToken, info.Lifecycle = "", nil
			all = append(all, info)
		}
	}
	p.mu.Unlock()
	slices.SortFunc(all, func(a, b client.Info) int { return b.StartedAt.Compare(a.StartedAt) })
	answer(w, http.StatusOK, page(p, w, r.URL.Query(), all))
}

// page cuts the page that was asked for out of a list.
func page[T any](p *Platform, w http.ResponseWriter, query url.Values, all []T) []T {
	offset, _ := strconv.Atoi(query.Get("nextToken"))
	all = all[min(offset, len(all)):]
	if size := cmp.Or(p.PageSize, 100); len(all) > size {
		all = all[:size]
		w.Header().Set("X-Next-Token", strconv.Itoa(offset+size))
	}
	return all
}

// forward is the data plane.
func (p *Platform) forward(w http.ResponseWriter, r *http.Request) {
	id := r.Header.Get("E2b-Sandbox-Id")
	g := p.find(id)
	if g == nil || !p.runs(id) || r.Header.Get("E2b-Sandbox-Port") != "49983" {
		answer(w, http.StatusBadGateway, map[string]any{"sandboxId": id, "message": "The sandbox was not found", "code": 502})
		return
	}
	// An answer that begins while the request is still being read must not end the
	// reading: the copy of the request would fail and take the answer with it.
	_ = http.NewResponseController(w).EnableFullDuplex()
	p.mu.Lock()
	awake := g.awake
	p.mu.Unlock()
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(awake, cancel)()
	g.proxy.ServeHTTP(w, r.WithContext(ctx))
}

func fail(w http.ResponseWriter, status int, message string) {
	answer(w, status, map[string]any{"code": status, "message": message})
}

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v)
}
