package controlplane

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// SetTimeout makes the sandbox's time to live end d from now, be that sooner or
// later than it was. Zero ends it at once.
func (c *ControlPlane) SetTimeout(ctx context.Context, teamID string, id sandbox.ID, d time.Duration) error {
	if d != 0 {
		if err := c.checkTimeout(d); err != nil {
			return err
		}
	}
	if _, err := c.running(ctx, teamID, id); err != nil {
		return err
	}
	ends := time.Now().Add(d)
	if err := c.boxes.SetEnds(ctx, id, ends); err != nil {
		return c.whyNotRunning(ctx, teamID, id, err)
	}
	c.expiry.changed(ends)
	return nil
}

// Refresh makes the sandbox live at least until d from now.
func (c *ControlPlane) Refresh(ctx context.Context, teamID string, id sandbox.ID, d time.Duration) error {
	if err := c.checkTimeout(d); err != nil {
		return err
	}
	if _, err := c.running(ctx, teamID, id); err != nil {
		return err
	}
	if _, err := c.boxes.ExtendEnds(ctx, id, time.Now().Add(d)); err != nil {
		return c.whyNotRunning(ctx, teamID, id, err)
	}
	return nil
}

// running returns the team's sandbox if it runs. One that is coming or going
// gives sandbox.ErrConflict, one that has ended sandbox.ErrNotFound.
func (c *ControlPlane) running(ctx context.Context, teamID string, id sandbox.ID) (sandbox.Sandbox, error) {
	b, err := c.owned(ctx, teamID, id)
	switch {
	case err != nil:
		return b, err
	case b.State.Final():
		return b, errGone(b)
	case b.State != sandbox.Running:
		return b, sandbox.Errorf(sandbox.ErrConflict, "sandbox %q is %s", id, b.State)
	}
	return b, nil
}

// whyNotRunning explains a write that lost against an end of the sandbox.
func (c *ControlPlane) whyNotRunning(ctx context.Context, teamID string, id sandbox.ID, err error) error {
	if errors.Is(err, sandbox.ErrConflict) {
		if _, why := c.running(ctx, teamID, id); why != nil {
			return why
		}
	}
	return err
}

// expiry knows until when the expiry loop sleeps.
type expiry struct {
	mu      sync.Mutex
	planned time.Time // zero: not known, wake it anyway
	wake    chan struct{}
}

// changed wakes the loop if an end is earlier than what it waits for.
func (e *expiry) changed(ends time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.planned.IsZero() && !ends.Before(e.planned) {
		return
	}
	select {
	case e.wake <- struct{}{}:
	default: // it is going to look anyway
	}
}

func (e *expiry) plan(t time.Time) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.planned = t
}

const (
	farAway    = 1000 * time.Hour // sleep of the loop when nothing runs
	storeRetry = time.Second      // after the store failed
)

// expire ends or pauses sandboxes when their time is over, until ctx is cancelled.
func (c *ControlPlane) expire(ctx context.Context, wg *sync.WaitGroup) {
	for {
		// Until the plan is known every change wakes the loop, so that none that
		// comes during the query is missed.
		c.expiry.plan(time.Time{})
		next, any, err := c.boxes.NextEnd(ctx, c.cfg.HostID)
		now := time.Now()
		switch {
		case err != nil:
			if ctx.Err() == nil {
				c.log.Error("find next sandbox to expire", "err", err)
			}
			next = now.Add(storeRetry)
		case !any:
			next = now.Add(farAway)
		case !next.After(now):
			if err := c.expireDue(ctx, wg, now); err == nil {
				continue
			} else if ctx.Err() == nil {
				c.log.Error("expire sandboxes", "err", err)
			}
			next = now.Add(storeRetry)
		}
		c.expiry.plan(next)
		timer := time.NewTimer(time.Until(next))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-c.expiry.wake:
			timer.Stop()
		case <-timer.C:
		}
	}
}

// expireDue ends or pauses every sandbox whose time is over. It returns when all
// are recorded as ending or pausing; what the agent has to do goes on in wg.
func (c *ControlPlane) expireDue(ctx context.Context, wg *sync.WaitGroup, now time.Time) error {
	due, err := c.boxes.List(ctx, store.Filter{
		HostID: c.cfg.HostID, States: []sandbox.State{sandbox.Running}, EndsBy: now, Ascending: true,
	})
	if err != nil {
		return err
	}
	var errs []error
	for _, b := range due {
		finish, err := c.claimExpiry(ctx, b, now)
		if err != nil {
			errs = append(errs, ignoreLost(err))
			continue
		}
		wg.Go(func() {
			if err := ignoreLost(finish()); err != nil && ctx.Err() == nil {
				c.log.Error("end expired sandbox", "sandbox", b.ID, "err", err)
			}
		})
	}
	return errors.Join(errs...)
}

// expired is why a sandbox whose time is over ends or is paused.
const expired = "its timeout expired"

// claimExpiry records what becomes of a sandbox whose time is over, and returns the
// rest of the work.
func (c *ControlPlane) claimExpiry(ctx context.Context, b sandbox.Sandbox, now time.Time) (finish func() error, err error) {
	if !b.Spec.AutoPause {
		// One that was paused meanwhile has no time to live any more.
		return c.claimEnd(ctx, b.ID, outcome{state: sandbox.Stopped, reason: expired, from: sandbox.Running, ifEndsBy: now})
	}
	if err := c.checkDisk(ctx, b.TeamID); errors.Is(err, sandbox.ErrExhausted) {
		c.log.Warn("expired sandbox is not paused yet", "sandbox", b.ID, "err", err, "retry_in", pauseAgain)
		_, err = c.boxes.ExtendEnds(ctx, b.ID, now.Add(pauseAgain))
		return func() error { return nil }, err
	} else if err != nil {
		return nil, err
	}
	return c.claimPause(ctx, b, b.Spec.AutoPauseMemory, store.Change{Cause: expired, IfEndsBy: now})
}
