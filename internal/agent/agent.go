// Package agent is the host agent: it owns the sandboxes that run on this host
// and everything they hold (runtime instances, network slots, directories),
// journals on disk what it owns, and takes it over again when it is restarted.
// The control plane knows it only through the RPC service in service.go.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Config is what an Agent is made from.
type Config struct {
	Dir       string          // the agent's part of the data directory
	Templates string          // directory of template builds
	Runtime   runtime.Runtime // makes the instances
	Network   network.Config  // for the pool of slots, which the agent owns
	GuestInit string          // path of the guest agent's binary; those of earlier builds are beside it
	Pool      int64           // bytes of memory for instances that wait for a sandbox; 0: none do
	Log       *slog.Logger

	CompressAfter time.Duration // of a pause, its image is made smaller; 0: never
}

// Agent is a host agent. Open makes one; Detach or Shutdown ends it.
type Agent struct {
	cfg   Config
	log   *slog.Logger
	slots *network.Pool
	ended *obituaries
	data  *proxy.Proxy
	pool  *pool

	ctx    context.Context // ends when the agent does
	cancel context.CancelFunc
	wg     sync.WaitGroup // monitors, the collector, the pool and transitions under way

	freeing  sync.WaitGroup // units being freed in the background
	releases releases

	mu        sync.Mutex
	closed    bool
	sandboxes map[sandbox.ID]*managed
}

// teardownLimit bounds the freeing of one sandbox. It does not follow the
// caller's context: freeing goes on when the caller has gone.
const teardownLimit = 30 * time.Second

// teardownRetry is the wait before what could not be freed is tried again.
const teardownRetry = time.Second

// Open takes over the sandboxes that an earlier agent with this directory left
// running, frees those that it left half-made, and starts.
func Open(ctx context.Context, cfg Config) (_ *Agent, err error) {
	a := &Agent{
		cfg:       cfg,
		log:       cfg.Log,
		ended:     newObituaries(),
		sandboxes: make(map[sandbox.ID]*managed),
	}
	a.data = proxy.New(proxy.Config{Resolver: guests{a}, Hop: true, Log: a.log})
	a.pool = newPool(a, cfg.Pool)
	a.ctx, a.cancel = context.WithCancel(context.Background())
	defer func() {
		if err != nil {
			a.cancel()
			a.freeing.Wait()
		}
	}()
	for _, dir := range []string{a.sandboxesDir(), a.instancesDir(), a.imagesDir(), a.endedDir(), a.pool.dir()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make agent directory: %w", err)
		}
	}
	if err := a.ended.load(a.endedDir()); err != nil {
		return nil, err
	}
	adopted, err := a.adoptAll(ctx)
	if err != nil {
		return nil, err
	}
	inUse := make([]int, 0, len(adopted))
	for _, m := range adopted {
		if m.unit != nil {
			inUse = append(inUse, m.rec.Slot)
		}
	}
	if err := errors.Join(a.sweepImages(), a.pool.sweep()); err != nil {
		return nil, err
	}
	if a.slots, err = network.Open(ctx, cfg.Network, inUse); err != nil {
		return nil, fmt.Errorf("prepare network slots: %w", err)
	}
	for _, m := range adopted {
		a.takeOver(m)
	}
	a.wg.Go(a.collect)
	a.wg.Go(func() { a.pool.run(a.ctx) })
	if cfg.CompressAfter > 0 {
		a.wg.Go(a.compressResting)
	}
	return a, nil
}

// Detach ends the agent and leaves its sandboxes running for the next one.
func (a *Agent) Detach(ctx context.Context) error {
	a.close()
	a.wg.Wait()
	a.freeing.Wait()
	for _, m := range a.list() {
		if _, _, c := m.status(); c != nil {
			c.Close()
		}
	}
	return a.slots.Close(ctx)
}

// Shutdown ends every sandbox that runs, frees all that the agent holds, and ends
// it. Paused sandboxes and snapshots stay: they hold nothing but room on the disk.
func (a *Agent) Shutdown(ctx context.Context) error {
	a.close()
	// What is under way first comes to its end, as running or as paused: what is
	// paused in the last moment is not to be ended, nor what is resumed to run on.
	a.wg.Wait()
	var g errgroup.Group
	g.SetLimit(8)
	for _, m := range a.list() {
		if rec, _, _ := m.status(); rec.State == sandbox.Paused {
			continue
		}
		g.Go(func() error { return a.stop(m, "the platform was shut down") })
	}
	err := g.Wait()
	a.freeing.Wait()
	return errors.Join(err, a.slots.Close(ctx))
}

// errClosed refuses work of an agent that ends.
var errClosed = sandbox.Errorf(sandbox.ErrUnavailable, "the host is shutting down; try again in a moment")

// close refuses new sandboxes, gives up on what is under way, and ends the
// background work.
func (a *Agent) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.closed = true
	a.cancel()
	a.data.Close()
	for _, m := range a.sandboxes {
		m.mu.Lock()
		m.cancel()
		m.mu.Unlock()
	}
}

// enter registers work that the agent's end waits for. The caller calls wg.Done.
func (a *Agent) enter() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return errClosed
	}
	a.wg.Add(1)
	return nil
}

func (a *Agent) sandboxesDir() string { return filepath.Join(a.cfg.Dir, "sandboxes") }

func (a *Agent) sandboxDir(id sandbox.ID) string { return filepath.Join(a.sandboxesDir(), string(id)) }

// get returns the sandbox of that id, or nil.
func (a *Agent) get(id sandbox.ID) *managed {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.sandboxes[id]
}

func (a *Agent) list() []*managed {
	a.mu.Lock()
	defer a.mu.Unlock()
	all := make([]*managed, 0, len(a.sandboxes))
	for _, m := range a.sandboxes {
		all = append(all, m)
	}
	return all
}

// add registers m, which is about to be made, under its id. The caller calls
// wg.Done when it has been made or undone.
func (a *Agent) add(m *managed) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return errClosed
	}
	if _, taken := a.sandboxes[m.id]; taken {
		return sandbox.Errorf(sandbox.ErrConflict, "sandbox id %s is taken", m.id)
	}
	a.sandboxes[m.id] = m
	a.wg.Add(1)
	return nil
}

func (a *Agent) remove(m *managed) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.sandboxes, m.id)
}
