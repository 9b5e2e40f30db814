// Package e2b serves E2B's control API: its routes, shapes, status codes and
// errors, as its SDKs and its command line expect them. What the platform does
// is behind the ControlPlane interface; nothing here outlives a request.
package e2b

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// ControlPlane is what the API needs of the platform. Errors carry the kinds of
// package sandbox; those without a kind are internal and not shown.
type ControlPlane interface {
	Authenticate(ctx context.Context, apiKey string) (store.Team, error)
	AccessToken(id sandbox.ID) string
	TrafficToken(id sandbox.ID) string

	Create(ctx context.Context, teamID string, req controlplane.CreateRequest) (sandbox.Sandbox, error)
	Get(ctx context.Context, teamID string, id sandbox.ID) (sandbox.Sandbox, error)
	List(ctx context.Context, teamID string, f store.Filter) ([]sandbox.Sandbox, error)
	Count(ctx context.Context, teamID string, f store.Filter) (int, error)
	Kill(ctx context.Context, teamID string, id sandbox.ID) error
	SetTimeout(ctx context.Context, teamID string, id sandbox.ID, d time.Duration) error
	Refresh(ctx context.Context, teamID string, id sandbox.ID, d time.Duration) error
	Connect(ctx context.Context, teamID string, id sandbox.ID, req controlplane.ConnectRequest) (b sandbox.Sandbox, resumed bool, err error)
	Resume(ctx context.Context, teamID string, id sandbox.ID, req controlplane.ResumeRequest) (sandbox.Sandbox, error)
	Pause(ctx context.Context, teamID string, id sandbox.ID, memory bool) error
	Fork(ctx context.Context, teamID string, id sandbox.ID, count int, timeout time.Duration) ([]controlplane.Forked, error)
	Events(ctx context.Context, teamID string, id sandbox.ID, f store.EventFilter) ([]sandbox.Event, error)
	TeamEvents(ctx context.Context, teamID string, f store.EventFilter) ([]sandbox.Event, error)
	Metrics(ctx context.Context, teamID string, id sandbox.ID, start, end time.Time) ([]controlplane.Metric, error)
	LatestMetrics(ctx context.Context, teamID string, ids []sandbox.ID) (map[sandbox.ID]controlplane.Metric, error)
	Logs(ctx context.Context, teamID string, id sandbox.ID, from time.Time) ([]controlplane.LogEntry, error)
	PreviewLink(ctx context.Context, teamID string, id sandbox.ID, port int, d time.Duration) (string, time.Time, error)

	Snapshot(ctx context.Context, teamID string, id sandbox.ID, name string) (store.Snapshot, error)
	Snapshots(ctx context.Context, teamID string, f store.SnapshotFilter) ([]store.Snapshot, error)
	DeleteSnapshot(ctx context.Context, teamID, ref string) error

	Template(ctx context.Context, teamID, ref string) (store.Template, error)
	Templates(ctx context.Context, teamID string) ([]store.Template, error)
}

// Config is what the API's handler needs.
type Config struct {
	ControlPlane ControlPlane
	Domain       string       // of the data plane, may hold a port; empty: clients use their own
	TLS          bool         // the domain is served over TLS, for clients on other machines
	EnvdVersion  string       // said of sandboxes whose record has none
	Metrics      http.Handler // serves the platform's metrics, which the operator's team may see; may be nil
	Log          *slog.Logger
}

type api struct {
	plane       ControlPlane
	domain      string
	tls         bool
	envdVersion string
	platform    http.Handler
	log         *slog.Logger
	routes      []route
}

// New returns the handler of the API.
func New(cfg Config) http.Handler {
	a := &api{plane: cfg.ControlPlane, domain: cfg.Domain, tls: cfg.TLS, envdVersion: cfg.EnvdVersion, platform: cfg.Metrics, log: cfg.Log}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	if a.envdVersion == "" {
		a.envdVersion = "0.6.13"
	}
	a.routes = a.table()
	return a
}

// call is one request on its way.
type call struct {
	w      http.ResponseWriter
	r      *http.Request
	team   store.Team
	params map[string]string // path parameters, decoded
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	allowCrossOrigin(w.Header())
	if r.Method == http.MethodOptions {
		w.WriteHeader(http.StatusNoContent)
		return
	}
	tracked := &trackedWriter{ResponseWriter: w}
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if err, ok := p.(error); ok && errors.Is(err, http.ErrAbortHandler) {
			panic(p)
		}
		a.log.Error("request handler panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
		if tracked.wrote {
			panic(http.ErrAbortHandler) // the client must not take half an answer for a whole one
		}
		a.writeError(tracked, r, fmt.Errorf("panic: %v", p))
	}()
	if err := a.serve(tracked, r); err != nil {
		a.writeError(tracked, r, err)
	}
}

func (a *api) serve(w http.ResponseWriter, r *http.Request) error {
	rt, params, err := a.match(r.Method, r.URL.EscapedPath())
	if err != nil {
		return err
	}
	c := &call{w: w, r: r, params: params}
	if !rt.open {
		if c.team, err = a.plane.Authenticate(r.Context(), apiKey(r)); err != nil {
			return err
		}
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	return rt.handle(c)
}

// apiKey takes the key from where E2B's clients put it.
func apiKey(r *http.Request) string {
	if k := r.Header.Get("X-API-Key"); k != "" {
		return k
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	if strings.EqualFold(scheme, "Bearer") {
		return strings.TrimSpace(token)
	}
	return ""
}

// allowCrossOrigin lets pages of any origin use the API: what authorizes a
// request is its key, never a cookie.
func allowCrossOrigin(h http.Header) {
	h.Set("Access-Control-Allow-Origin", "*")
	h.Set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE, OPTIONS")
	h.Set("Access-Control-Allow-Headers", "Authorization, Content-Type, X-API-Key, X-Team-ID, X-Admin-Token, Idempotency-Key, "+
		"User-Agent, browser, lang, lang_version, machine, os, package_version, processor, publisher, release, sdk_runtime, system, integration")
	h.Set("Access-Control-Expose-Headers", "X-Next-Token, X-Total-Running, Retry-After, "+
		"RateLimit, RateLimit-Limit, RateLimit-Policy, RateLimit-Remaining, RateLimit-Reset")
	h.Set("Access-Control-Max-Age", "7200")
}

// trackedWriter knows whether the answer has begun.
type trackedWriter struct {
	http.ResponseWriter
	wrote bool
}

func (t *trackedWriter) WriteHeader(code int) { t.wrote = true; t.ResponseWriter.WriteHeader(code) }

func (t *trackedWriter) Write(p []byte) (int, error) {
	t.wrote = true
	return t.ResponseWriter.Write(p)
}

func (t *trackedWriter) Unwrap() http.ResponseWriter { return t.ResponseWriter }
