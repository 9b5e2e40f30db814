// Package controlplanetest has a host agent in memory for tests that inject
// faults which a real one does not have on demand. It is reached as a real one
// is: through the RPC client, over HTTP.
package controlplanetest

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/api/proto/hostagent/hostagentconnect"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Agent is a host agent whose sandboxes are entries of a map.
type Agent struct {
	Client hostagentconnect.HostAgentClient

	// Hooks are called at the beginning of the RPC, outside of any lock; an
	// error of theirs is the answer. Set them before use or with SetHooks.
	OnCreate                      func(ctx context.Context, req *hostagent.CreateSandboxRequest) error
	OnStop                        func(ctx context.Context, id string) error
	OnPause, OnResume, OnSnapshot func(ctx context.Context, id string) error

	mu       sync.Mutex
	boxes    map[string]*hostagent.SandboxStatus // the ended ones too
	created  map[string]*hostagent.CreateSandboxRequest
	tokens   map[string]string
	stops    map[string]int
	logs     map[string][]*hostagent.LogEntry
	resumed  map[string]int
	images   map[string]time.Time
	down     bool
	outage   chan struct{} // closed when streams are to break
	watchers map[chan *hostagent.SandboxStatus]struct{}
	nextIP   int
	watching chan struct{} // gets one per stream that has begun
}

// NewAgent starts an agent that is stopped with the test.
func NewAgent(t testing.TB) *Agent {
	a := &Agent{
		boxes: make(map[string]*hostagent.SandboxStatus), created: make(map[string]*hostagent.CreateSandboxRequest),
		tokens: make(map[string]string), stops: make(map[string]int), logs: make(map[string][]*hostagent.LogEntry),
		resumed: make(map[string]int), images: make(map[string]time.Time),
		outage: make(chan struct{}), watchers: make(map[chan *hostagent.SandboxStatus]struct{}),
		watching: make(chan struct{}, 1000),
	}
	mux := http.NewServeMux()
	mux.Handle(hostagentconnect.NewHostAgentHandler(a))
	srv := httptest.NewServer(mux)
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(func() {
		a.SetDown(true)
		transport.CloseIdleConnections()
		srv.Close()
	})
	a.Client = hostagentconnect.NewHostAgentClient(&http.Client{Transport: transport}, srv.URL)
	return a
}

// SetHooks replaces both hooks.
func (a *Agent) SetHooks(onCreate func(context.Context, *hostagent.CreateSandboxRequest) error, onStop func(context.Context, string) error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.OnCreate, a.OnStop = onCreate, onStop
}

// SetDown makes every RPC fail, and breaks the streams, or ends that.
func (a *Agent) SetDown(down bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if down && !a.down {
		close(a.outage)
	} else if !down && a.down {
		a.outage = make(chan struct{})
	}
	a.down = down
}

// AwaitWatcher returns when one more event stream has begun.
func (a *Agent) AwaitWatcher() { <-a.watching }

// Put adds a sandbox as if it had been created or had ended before.
func (a *Agent) Put(id sandbox.ID, state sandbox.State, reason string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.boxes[string(id)] = &hostagent.SandboxStatus{
		SandboxId: string(id), State: string(state), Reason: reason, Address: "10.0.0.9", ChangedAt: timestamppb.Now(),
	}
	if state == sandbox.Paused {
		a.boxes[string(id)].ImageBytes = imageBytes
	}
}

// Vanish forgets a sandbox without a word.
func (a *Agent) Vanish(id sandbox.ID) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.boxes, string(id))
}

// End makes a sandbox end by itself.
func (a *Agent) End(id sandbox.ID, reason string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := &hostagent.SandboxStatus{SandboxId: string(id), State: string(sandbox.Failed), Reason: reason, ChangedAt: timestamppb.Now()}
	a.boxes[string(id)] = s
	for w := range a.watchers {
		w <- s
	}
}

// Log adds a line to a sandbox's log.
func (a *Agent) Log(id sandbox.ID, level, message string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.logs[string(id)] = append(a.logs[string(id)], &hostagent.LogEntry{
		Time: timestamppb.Now(), Level: level, Message: message, Fields: map[string]string{"logger": "envd"},
	})
}

// Living returns the ids of the sandboxes that it has, sorted.
func (a *Agent) Living() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	var ids []string
	for id, s := range a.boxes {
		if !sandbox.State(s.State).Final() {
			ids = append(ids, id)
		}
	}
	slices.Sort(ids)
	return ids
}

// Stops returns how many times the sandbox was asked to stop.
func (a *Agent) Stops(id sandbox.ID) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.stops[string(id)]
}

// Created returns what the sandbox was asked to be, or nil.
func (a *Agent) Created(id sandbox.ID) *hostagent.CreateSandboxRequest {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.created[string(id)]
}

// Token returns the access token that SetAccessToken gave for the sandbox.
func (a *Agent) Token(id sandbox.ID) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.tokens[string(id)]
}

func (a *Agent) up() error {
	if a.down {
		return connect.NewError(connect.CodeUnavailable, errors.New("down for the test"))
	}
	return nil
}

// GetHost implements the RPC.
func (a *Agent) GetHost(context.Context, *hostagent.GetHostRequest) (*hostagent.GetHostResponse, error) {
	return &hostagent.GetHostResponse{Runtime: "memory"}, nil
}

// CreateSandbox implements the RPC.
func (a *Agent) CreateSandbox(ctx context.Context, req *hostagent.CreateSandboxRequest) (*hostagent.CreateSandboxResponse, error) {
	a.mu.Lock()
	hook, err := a.OnCreate, a.up()
	a.mu.Unlock()
	if err != nil {
		return nil, err
	}
	if hook != nil {
		if err := hook(ctx, req); err != nil {
			return nil, err
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.boxes[req.SandboxId] != nil {
		return nil, connect.NewError(connect.CodeAlreadyExists, errors.New("the id is taken"))
	}
	a.nextIP++
	addr := fmt.Sprintf("10.0.%d.%d", a.nextIP/250, a.nextIP%250+1)
	a.boxes[req.SandboxId] = &hostagent.SandboxStatus{
		SandboxId: req.SandboxId, State: string(sandbox.Running), Address: addr, ChangedAt: timestamppb.Now(),
	}
	a.created[req.SandboxId] = req
	return &hostagent.CreateSandboxResponse{Address: addr, EnvdVersion: "0.6.99"}, nil
}

// StopSandbox implements the RPC.
func (a *Agent) StopSandbox(ctx context.Context, req *hostagent.StopSandboxRequest) (*hostagent.StopSandboxResponse, error) {
	a.mu.Lock()
	hook, err := a.OnStop, a.up()
	if err == nil {
		a.stops[req.SandboxId]++
	}
	a.mu.Unlock()
	if err == nil && hook != nil {
		err = hook(ctx, req.SandboxId)
	}
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.boxes, req.SandboxId)
	return &hostagent.StopSandboxResponse{}, nil
}

// SetAccessToken implements the RPC.
func (a *Agent) SetAccessToken(_ context.Context, req *hostagent.SetAccessTokenRequest) (*hostagent.SetAccessTokenResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.up(); err != nil {
		return nil, err
	}
	if a.boxes[req.SandboxId] == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	a.tokens[req.SandboxId] = req.AccessToken
	return &hostagent.SetAccessTokenResponse{}, nil
}

// ListSandboxes implements the RPC.
func (a *Agent) ListSandboxes(context.Context, *hostagent.ListSandboxesRequest) (*hostagent.ListSandboxesResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.up(); err != nil {
		return nil, err
	}
	resp := &hostagent.ListSandboxesResponse{}
	for _, s := range a.boxes {
		resp.Sandboxes = append(resp.Sandboxes, s)
	}
	return resp, nil
}

// WatchSandboxes implements the RPC.
func (a *Agent) WatchSandboxes(ctx context.Context, _ *hostagent.WatchSandboxesRequest, stream *connect.ServerStream[hostagent.WatchSandboxesResponse]) error {
	a.mu.Lock()
	if err := a.up(); err != nil {
		a.mu.Unlock()
		return err
	}
	w, outage := make(chan *hostagent.SandboxStatus, 1000), a.outage
	a.watchers[w] = struct{}{}
	a.mu.Unlock()
	defer func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.watchers, w)
	}()
	msg := &hostagent.WatchSandboxesResponse{}
	for {
		if err := stream.Send(msg); err != nil {
			return err
		}
		if msg.Ended == nil {
			a.watching <- struct{}{}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-outage:
			return connect.NewError(connect.CodeUnavailable, errors.New("down for the test"))
		case s := <-w:
			msg = &hostagent.WatchSandboxesResponse{Ended: s}
		}
	}
}

// GetMetrics implements the RPC.
func (a *Agent) GetMetrics(_ context.Context, req *hostagent.GetMetricsRequest) (*hostagent.GetMetricsResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.up(); err != nil {
		return nil, err
	}
	resp := &hostagent.GetMetricsResponse{Series: make(map[string]*hostagent.MetricSeries)}
	for _, id := range req.SandboxIds {
		if a.boxes[id] == nil {
			continue
		}
		series := &hostagent.MetricSeries{}
		for i := range 3 {
			at := time.Unix(1_700_000_000+int64(5*i), 0)
			if (req.Start != nil && at.Before(req.Start.AsTime())) || (req.End != nil && at.After(req.End.AsTime())) {
				continue
			}
			series.Samples = append(series.Samples, &hostagent.MetricSample{
				Time: timestamppb.New(at), CpuCount: 2, CpuUsedPct: 12.5, MemUsed: int64(100 + i), MemTotal: 1000,
				MemCache: 7, DiskUsed: 20, DiskTotal: 30,
			})
		}
		if n := len(series.Samples); req.LatestOnly && n > 0 {
			series.Samples = series.Samples[n-1:]
		}
		resp.Series[id] = series
	}
	return resp, nil
}

// GetLogs implements the RPC.
func (a *Agent) GetLogs(_ context.Context, req *hostagent.GetLogsRequest) (*hostagent.GetLogsResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err := a.up(); err != nil {
		return nil, err
	}
	entries, found := a.logs[req.SandboxId]
	if !found && a.boxes[req.SandboxId] == nil {
		return nil, connect.NewError(connect.CodeNotFound, errors.New("no logs are kept of that sandbox"))
	}
	return &hostagent.GetLogsResponse{Entries: entries}, nil
}
