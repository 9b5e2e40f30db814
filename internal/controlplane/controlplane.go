// Package controlplane is what the platform does for its users: create, list,
// kill and expire sandboxes, keep the records true to what the host agent has,
// and resolve sandboxes for the data plane. It knows the host agent only through
// its RPC interface and keeps all its state in the store: what it holds in
// memory can be made again from there.
package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/api/proto/hostagent/hostagentconnect"
	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// Config is what a ControlPlane needs.
type Config struct {
	Store     store.Store
	Agent     hostagentconnect.HostAgentClient
	HostID    string // the agent's name in records
	MasterKey []byte // access tokens are derived from it
	Log       *slog.Logger
	Limits    Limits

	// OnGone is called when a sandbox stops being reachable, before its guest is
	// torn down. May be nil.
	OnGone func(id string)
}

// Limits bound what users can ask for. Zero fields get the defaults.
type Limits struct {
	TeamSandboxes  int   // a team's sandboxes that take memory at once; 0: any number
	TeamImageBytes int64 // room on disk for a team's snapshots and paused sandboxes; 0: any

	MaxTimeout time.Duration     // longest time to live from now; 24 h
	Resources  sandbox.Resources // where template and request name none; 2 CPUs, 512 MiB, 4 GiB disk, 4096 tasks
	Max        sandbox.Resources // most that a request can ask for; 8 CPUs, 8 GiB, 32 GiB disk, 32768 tasks
}

func (l *Limits) setDefaults() {
	if l.MaxTimeout == 0 {
		l.MaxTimeout = 24 * time.Hour
	}
	l.Resources = or(l.Resources, sandbox.Resources{CPUs: 2, MemoryMiB: 512, DiskMiB: 4096, PIDs: 4096})
	l.Max = or(l.Max, sandbox.Resources{CPUs: 8, MemoryMiB: 8192, DiskMiB: 32768, PIDs: 32768})
}

const (
	createLimit   = 2 * time.Minute // for the agent to make a sandbox
	endLimit      = time.Minute     // for the agent to tear one down
	recordsKept   = 24 * time.Hour  // how long the record of an ended sandbox is kept
	eventsKept    = 30 * 24 * time.Hour
	reconcileGap  = 5 * time.Second // between looks for what an outage left undone
	purgeInterval = time.Hour
)

// ControlPlane is the platform's use cases. It is safe for concurrent use.
type ControlPlane struct {
	cfg    Config
	log    *slog.Logger
	boxes  store.Sandboxes
	live   live
	ops    operations
	keys   keyCache
	expiry expiry
	ready  ready

	reconcileNow chan struct{}
	stopping     chan struct{}  // closed when Run ends
	background   sync.WaitGroup // what goes on when its caller has been answered
}

// New makes a control plane. It does nothing by itself until Run.
func New(cfg Config) *ControlPlane {
	cfg.Limits.setDefaults()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.OnGone == nil {
		cfg.OnGone = func(string) {}
	}
	return &ControlPlane{
		cfg: cfg, log: cfg.Log, boxes: cfg.Store.Sandboxes(),
		live:         live{entries: make(map[sandbox.ID]proxy.Target)},
		ops:          newOperations(),
		keys:         keyCache{entries: make(map[[32]byte]cachedKey)},
		expiry:       expiry{wake: make(chan struct{}, 1)},
		reconcileNow: make(chan struct{}, 1),
		stopping:     make(chan struct{}),
	}
}

// Run ends sandboxes whose time is over, follows the host agent's events, and
// repairs what a crash or an outage left undone, until ctx is cancelled. It
// returns when everything it started has ended; sandboxes keep running. It is
// called once.
func (c *ControlPlane) Run(ctx context.Context) error {
	if err := c.loadLive(ctx); err != nil {
		return fmt.Errorf("load running sandboxes: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer c.background.Wait()
	defer close(c.stopping)
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { c.expire(ctx, &wg); return nil })
	g.Go(func() error { c.watch(ctx, &wg); return nil })
	g.Go(func() error { c.reconcileLoop(ctx, &wg); return nil })
	g.Go(func() error { c.purge(ctx); return nil })
	return g.Wait()
}

// purge deletes records of long ended sandboxes, and old events.
func (c *ControlPlane) purge(ctx context.Context) {
	tick := time.NewTicker(purgeInterval)
	defer tick.Stop()
	for {
		n, err := c.boxes.Purge(ctx, time.Now().Add(-recordsKept))
		if err != nil && ctx.Err() == nil {
			c.log.Error("purge records of ended sandboxes", "err", err)
		} else if n > 0 {
			c.log.Info("purged records of ended sandboxes", "count", n)
		}
		if _, err := c.cfg.Store.Events().Purge(ctx, time.Now().Add(-eventsKept)); err != nil && ctx.Err() == nil {
			c.log.Error("purge events", "err", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// owned returns the record of the team's sandbox, ended or not. Sandboxes of
// others do not exist for it.
func (c *ControlPlane) owned(ctx context.Context, teamID string, id sandbox.ID) (sandbox.Sandbox, error) {
	b, err := c.boxes.Get(ctx, id)
	if err == nil && b.TeamID != teamID {
		err = sandbox.ErrNotFound
	}
	if errors.Is(err, sandbox.ErrNotFound) {
		return b, sandbox.Errorf(sandbox.ErrNotFound, "sandbox %q not found", id)
	}
	return b, err
}

// errGone says that a sandbox is not there and, where it is known, how it ended.
func errGone(b sandbox.Sandbox) error {
	switch {
	case b.State == sandbox.Stopping:
		return sandbox.Errorf(sandbox.ErrNotFound, "sandbox %q not found: it is being stopped: %s", b.ID, b.Reason)
	case b.Reason == "":
		return sandbox.Errorf(sandbox.ErrNotFound, "sandbox %q not found: it ended at %s", b.ID, b.Ended.Format(time.RFC3339))
	}
	return sandbox.Errorf(sandbox.ErrNotFound, "sandbox %q not found: it ended at %s: %s", b.ID, b.Ended.Format(time.RFC3339), b.Reason)
}

// or fills what r leaves open from d.
func or(r, d sandbox.Resources) sandbox.Resources {
	if r.CPUs == 0 {
		r.CPUs = d.CPUs
	}
	if r.MemoryMiB == 0 {
		r.MemoryMiB = d.MemoryMiB
	}
	if r.DiskMiB == 0 {
		r.DiskMiB = d.DiskMiB
	}
	if r.PIDs == 0 {
		r.PIDs = d.PIDs
	}
	return r
}
