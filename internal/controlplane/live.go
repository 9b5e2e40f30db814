package controlplane

import (
	"context"
	"net/netip"
	"sync"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// live is what the data plane asks about on every request: where running
// sandboxes are, which paused ones a request wakes, and who may reach them.
type live struct {
	mu      sync.RWMutex
	entries map[sandbox.ID]proxy.Target
	loaded  bool // entries has all there are, not only what this process made
}

// remember makes a sandbox reachable.
func (c *ControlPlane) remember(b sandbox.Sandbox, addr netip.Addr) {
	c.live.mu.Lock()
	defer c.live.mu.Unlock()
	c.live.entries[b.ID] = c.target(b, addr)
}

// forget makes a sandbox unreachable and cuts its connections.
func (c *ControlPlane) forget(id sandbox.ID) {
	c.live.mu.Lock()
	delete(c.live.entries, id)
	c.live.mu.Unlock()
	c.cfg.OnGone(string(id))
}

// sleep makes a sandbox one that requests wake, and cuts its connections.
func (c *ControlPlane) sleep(b sandbox.Sandbox) {
	c.live.mu.Lock()
	c.live.entries[b.ID] = c.asleep(b)
	c.live.mu.Unlock()
	c.cfg.OnGone(string(b.ID))
}

// asleep is what the data plane has to know of a sandbox that requests wake.
func (c *ControlPlane) asleep(b sandbox.Sandbox) proxy.Target {
	t := c.target(b, netip.Addr{})
	t.Wake = func(ctx context.Context) (proxy.Target, error) { return c.wake(ctx, b.ID) }
	return t
}

// wakes reports whether requests wake b while it does not run. What has kept only
// its files would boot without its processes: nobody would answer.
func wakes(b sandbox.Sandbox) bool {
	switch b.State {
	case sandbox.Pausing, sandbox.Paused, sandbox.Resuming:
		return b.Spec.AutoResume && b.MemoryKept
	}
	return false
}

// loadLive makes the sandboxes reachable that an earlier process left running or
// paused.
func (c *ControlPlane) loadLive(ctx context.Context) error {
	c.live.mu.Lock()
	defer c.live.mu.Unlock()
	if c.live.loaded {
		return nil
	}
	all, err := c.boxes.List(ctx, store.Filter{States: []sandbox.State{
		sandbox.Running, sandbox.Pausing, sandbox.Paused, sandbox.Resuming,
	}})
	if err != nil {
		return err
	}
	for _, b := range all {
		switch {
		case wakes(b):
			c.live.entries[b.ID] = c.asleep(b)
		case b.State == sandbox.Running:
			addr, err := netip.ParseAddr(b.Address)
			if err != nil {
				c.log.Error("sandbox has an unusable address", "sandbox", b.ID, "err", err)
				continue
			}
			c.live.entries[b.ID] = c.target(b, addr)
		}
	}
	c.live.loaded = true
	return nil
}

// Resolve says where a sandbox is reached and by whom, or how it is woken;
// sandbox.ErrNotFound when there is none of that id. It implements proxy.Resolver.
func (c *ControlPlane) Resolve(ctx context.Context, id string) (proxy.Target, error) {
	c.live.mu.RLock()
	target, found := c.live.entries[sandbox.ID(id)]
	loaded := c.live.loaded
	c.live.mu.RUnlock()
	if !found && !loaded {
		if err := c.loadLive(ctx); err != nil {
			return proxy.Target{}, err
		}
		return c.Resolve(ctx, id)
	}
	if !found {
		return proxy.Target{}, sandbox.ErrNotFound
	}
	return target, nil
}
