package controlplane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"time"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

const (
	watchSilence = 45 * time.Second       // three heartbeats missed: the stream is dead
	watchBackoff = 500 * time.Millisecond // longest wait before the next try, about
)

// watch follows the agent's events until ctx is cancelled, and asks for a
// reconciliation whenever it may have missed some.
func (c *ControlPlane) watch(ctx context.Context, wg *sync.WaitGroup) {
	const first = 50 * time.Millisecond
	wait, level := first, slog.LevelWarn
	for ctx.Err() == nil {
		heard, err := c.follow(ctx, wg)
		if ctx.Err() != nil {
			return
		}
		if heard {
			wait, level = first, slog.LevelWarn
		}
		c.log.Log(ctx, level, "the host agent does not answer", "err", err)
		level = slog.LevelDebug // said once is enough
		select {
		case <-ctx.Done():
		case <-time.After(wait/2 + rand.N(wait)):
		}
		wait = min(2*wait, watchBackoff)
	}
}

// follow reads one stream of events to its end, and says whether there was any.
func (c *ControlPlane) follow(ctx context.Context, wg *sync.WaitGroup) (heard bool, err error) {
	streamCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	silence := time.AfterFunc(watchSilence, func() { cancel(errors.New("no heartbeat")) })
	defer silence.Stop()
	stream, err := c.cfg.Agent.WatchSandboxes(streamCtx, &hostagent.WatchSandboxesRequest{})
	if err != nil {
		return false, err
	}
	defer stream.Close()
	for first := true; stream.Receive(); first = false {
		heard = true
		silence.Reset(watchSilence)
		if first {
			select {
			case c.reconcileNow <- struct{}{}:
			default:
			}
		}
		if s := stream.Msg().GetEnded(); s != nil {
			wg.Go(func() { c.onEnded(ctx, s) })
		}
	}
	if cause := context.Cause(streamCtx); cause != nil {
		return heard, cause
	}
	return heard, stream.Err()
}

// onEnded records the end of a sandbox that nobody asked for.
func (c *ControlPlane) onEnded(ctx context.Context, s *hostagent.SandboxStatus) {
	id := sandbox.ID(s.GetSandboxId())
	if mv := c.ops.move(id); mv != nil {
		// It may have ended between the agent's answer and our record of it.
		select {
		case <-mv.done:
		case <-ctx.Done():
			return
		}
	}
	err := ignoreLost(c.fail(ctx, id, sandbox.Running, endReason(s), s.GetChangedAt().AsTime()))
	if err != nil && ctx.Err() == nil {
		c.log.Error("record end of sandbox", "sandbox", id, "err", err)
	}
}

func endReason(s *hostagent.SandboxStatus) string {
	if s.GetReason() == "" {
		return "it ended by itself"
	}
	return s.GetReason()
}

// reconcileLoop compares records and agent when asked to, and now and then.
func (c *ControlPlane) reconcileLoop(ctx context.Context, wg *sync.WaitGroup) {
	tick := time.NewTicker(reconcileGap)
	defer tick.Stop()
	for {
		connected := false
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-c.reconcileNow:
			connected = true
		}
		if err := c.reconcile(ctx, wg, connected); err != nil && ctx.Err() == nil {
			c.log.Warn("reconcile with the host agent", "err", err)
		}
	}
}

// reconcile finishes or undoes what a crash or an outage cut off, so that the
// records and the agent agree. What this process is working on is left alone. An
// agent that was just connected to also gets the access tokens that it does not
// keep.
func (c *ControlPlane) reconcile(ctx context.Context, wg *sync.WaitGroup, connected bool) error {
	// Records first: what runs by its record and is not on the agent afterwards
	// has ended meanwhile or is lost; the transition tells which.
	records, err := c.boxes.List(ctx, store.Filter{HostID: c.cfg.HostID, States: []sandbox.State{
		sandbox.Pending, sandbox.Starting, sandbox.Running, sandbox.Pausing, sandbox.Paused, sandbox.Resuming, sandbox.Stopping,
	}})
	if err != nil {
		return fmt.Errorf("list records: %w", err)
	}
	have, err := c.listAgent(ctx)
	if err != nil {
		return err
	}
	if connected {
		err = c.prepareTemplates(ctx)
	}
	var missing []sandbox.Sandbox
	for _, b := range records {
		s := have[b.ID]
		switch {
		case c.ops.busy(b.ID):
		case s == nil && keptByHost(b.State):
			missing = append(missing, b)
		case keptByHost(b.State) && sandbox.State(s.GetState()).Final():
			err = errors.Join(err, ignoreLost(c.fail(ctx, b.ID, b.State, endReason(s), s.GetChangedAt().AsTime())))
		case differs(b, s):
			c.alignInBackground(ctx, wg, b.ID)
		case b.State == sandbox.Running:
			c.follows(b, s)
			if connected {
				err = errors.Join(err, c.giveToken(ctx, b))
			}
		case b.State == sandbox.Pausing || b.State == sandbox.Resuming:
			c.settleInBackground(wg, b.ID, "the control plane was restarted meanwhile")
		case b.State == sandbox.Paused:
		case b.State == sandbox.Stopping:
			end := sandbox.Stopped
			if strings.HasPrefix(b.Reason, createFailed) {
				end = sandbox.Failed
			}
			c.endInBackground(ctx, wg, b.ID, outcome{state: end, reason: b.Reason, from: b.State})
		default: // Pending, Starting: its creator never learned the id
			c.endInBackground(ctx, wg, b.ID, outcome{
				state: sandbox.Failed, reason: createFailed + "the control plane restarted meanwhile", from: b.State,
			})
		}
	}
	return errors.Join(err, c.declareLost(ctx, missing), c.stopOrphans(ctx, wg, have), c.collectImages(ctx))
}

// keptByHost reports whether the agent has a sandbox that is in this state by its
// record, once it was in it.
func keptByHost(s sandbox.State) bool {
	switch s {
	case sandbox.Running, sandbox.Pausing, sandbox.Paused, sandbox.Resuming:
		return true
	}
	return false
}

// listAgent returns what the agent has and what of the past it remembers.
func (c *ControlPlane) listAgent(ctx context.Context) (map[sandbox.ID]*hostagent.SandboxStatus, error) {
	resp, err := c.cfg.Agent.ListSandboxes(ctx, &hostagent.ListSandboxesRequest{})
	if err != nil {
		return nil, agentError("list sandboxes of host", err)
	}
	have := make(map[sandbox.ID]*hostagent.SandboxStatus, len(resp.GetSandboxes()))
	for _, s := range resp.GetSandboxes() {
		id := sandbox.ID(s.GetSandboxId())
		if other := have[id]; other != nil && !sandbox.State(other.GetState()).Final() {
			continue // listed twice, as living and as dead: the living is torn down if need be
		}
		have[id] = s
	}
	return have, nil
}

// declareLost fails the records of sandboxes that the agent does not have, after
// a second look: one that was ending during the first may have been in neither
// the list of the living nor that of the dead.
func (c *ControlPlane) declareLost(ctx context.Context, missing []sandbox.Sandbox) error {
	if len(missing) == 0 {
		return nil
	}
	have, err := c.listAgent(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, b := range missing {
		s := have[b.ID]
		switch {
		case s == nil:
			errs = append(errs, ignoreLost(c.fail(ctx, b.ID, b.State, "lost: its host does not have it any more", time.Time{})))
		case sandbox.State(s.GetState()).Final():
			errs = append(errs, ignoreLost(c.fail(ctx, b.ID, b.State, endReason(s), s.GetChangedAt().AsTime())))
		}
	}
	return errors.Join(errs...)
}

// stopOrphans ends what runs on the agent and by the records should not.
func (c *ControlPlane) stopOrphans(ctx context.Context, wg *sync.WaitGroup, have map[sandbox.ID]*hostagent.SandboxStatus) error {
	for id, s := range have {
		if sandbox.State(s.GetState()).Final() || c.ops.busy(id) {
			continue
		}
		// A create writes its record before it asks the agent, so the record of
		// whatever was on the list is there now.
		b, err := c.boxes.Get(ctx, id)
		if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
			return fmt.Errorf("look up sandbox %s: %w", id, err)
		}
		if err == nil && (!b.State.Final() || c.ops.busy(id)) {
			continue
		}
		c.log.Warn("stopping a sandbox that no record asks for", "sandbox", id)
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
			defer cancel()
			if err := c.stopOnAgent(ctx, id); err != nil {
				c.log.Error("stop a sandbox that no record asks for", "sandbox", id, "err", err)
			}
		})
	}
	return nil
}

// follows corrects where a running sandbox is reached, should that have changed.
func (c *ControlPlane) follows(b sandbox.Sandbox, s *hostagent.SandboxStatus) {
	addr, err := netip.ParseAddr(s.GetAddress())
	if err != nil || s.GetAddress() == b.Address {
		return
	}
	c.live.mu.Lock()
	if _, found := c.live.entries[b.ID]; found {
		c.live.entries[b.ID] = c.target(b, addr)
	}
	c.live.mu.Unlock()
	c.log.Info("sandbox is reached elsewhere now", "sandbox", b.ID, "address", addr)
}

// giveToken tells the agent the token of a sandbox that it may have taken over
// from an earlier agent.
func (c *ControlPlane) giveToken(ctx context.Context, b sandbox.Sandbox) error {
	if !b.Spec.Secured {
		return nil
	}
	_, err := c.cfg.Agent.SetAccessToken(ctx, &hostagent.SetAccessTokenRequest{
		SandboxId: string(b.ID), AccessToken: c.AccessToken(b.ID),
	})
	if err != nil {
		return ignoreLost(agentError("give access token to host agent", err))
	}
	return nil
}

func (c *ControlPlane) endInBackground(ctx context.Context, wg *sync.WaitGroup, id sandbox.ID, o outcome) {
	wg.Go(func() {
		// It may have gone on since the records were read: then it is in good hands.
		if err := ignoreLost(c.end(ctx, id, o)); err != nil && ctx.Err() == nil {
			c.log.Error("finish ending a sandbox", "sandbox", id, "err", err)
		}
	})
}

// ignoreLost drops the error of a change that somebody else was faster with.
func ignoreLost(err error) error {
	if errors.Is(err, sandbox.ErrConflict) || errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	return err
}
