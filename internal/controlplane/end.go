package controlplane

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// outcome is how a sandbox is to end.
type outcome struct {
	state    sandbox.State // Stopped or Failed
	reason   string
	from     sandbox.State // only if it is in this state; empty: whatever
	ifEndsBy time.Time     // only if its time to live is over by then; zero: whatever
}

// Kill ends the team's sandbox in whatever state it is, and returns when nothing
// of it is left. A second kill at the same time waits for the first; one after
// the end gives sandbox.ErrNotFound.
func (c *ControlPlane) Kill(ctx context.Context, teamID string, id sandbox.ID) error {
	if _, err := c.owned(ctx, teamID, id); err != nil {
		return err
	}
	return c.end(ctx, id, outcome{state: sandbox.Stopped, reason: "it was killed"})
}

// end tears a sandbox down. Once begun it goes on whatever becomes of ctx.
func (c *ControlPlane) end(ctx context.Context, id sandbox.ID, o outcome) error {
	finish, err := c.claimEnd(ctx, id, o)
	if err != nil {
		return err
	}
	return finish()
}

// claimEnd records that the sandbox is ending, from when on it is unreachable,
// and returns the rest of the work. Where a teardown is in progress, that is to
// wait for it.
func (c *ControlPlane) claimEnd(ctx context.Context, id sandbox.ID, o outcome) (finish func() error, err error) {
	e, mine := c.ops.beginEnd(id)
	if !mine {
		return func() error {
			select {
			case <-e.done:
				if !e.claimed {
					// It came to nothing on grounds of its own, such as an expiry that
					// was put off meanwhile.
					return c.end(ctx, id, o)
				}
				return e.err
			case <-ctx.Done():
				return ctx.Err()
			}
		}, nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
	if err := c.moveToStopping(ctx, id, o); err != nil {
		cancel()
		c.ops.finishEnd(id, e, false, err)
		return nil, err
	}
	c.forget(id)
	return func() error {
		defer cancel()
		err := c.finishStopping(ctx, id, o)
		c.ops.finishEnd(id, e, true, err)
		return err
	}, nil
}

// moveToStopping takes the record from whatever state it is in to Stopping, where
// it also may be already: then an earlier teardown did not get to its end.
func (c *ControlPlane) moveToStopping(ctx context.Context, id sandbox.ID, o outcome) error {
	for {
		b, err := c.boxes.Get(ctx, id)
		if err != nil {
			return err
		}
		if b.State.Final() {
			return errGone(b)
		}
		if o.from != "" && b.State != o.from {
			return sandbox.Errorf(sandbox.ErrConflict, "sandbox %q is %s", id, b.State)
		}
		if b.State == sandbox.Stopping {
			return nil
		}
		err = c.boxes.Transition(ctx, id, b.State, store.Change{State: sandbox.Stopping, Reason: o.reason, IfEndsBy: o.ifEndsBy})
		if err == nil || !errors.Is(err, sandbox.ErrConflict) {
			return err
		}
		if !o.ifEndsBy.IsZero() {
			return err // extended, or gone another way: either way no longer for the expiry
		}
	}
}

// finishStopping has the agent free the sandbox and records the end.
func (c *ControlPlane) finishStopping(ctx context.Context, id sandbox.ID, o outcome) error {
	if mv := c.ops.move(id); mv != nil {
		mv.cancel()
		select {
		case <-mv.done:
		case <-ctx.Done():
			return ctx.Err()
		}
		c.forget(id) // a pause may have made it one that requests wake
	}
	if err := c.stopOnAgent(ctx, id); err != nil {
		return err // the record stays Stopping; the reconciler goes on from there
	}
	err := c.boxes.Transition(ctx, id, sandbox.Stopping, store.Change{State: o.state, Ended: time.Now()})
	if err != nil {
		return fmt.Errorf("record end of sandbox: %w", err)
	}
	c.log.Info("sandbox ended", "sandbox", id, "state", o.state, "reason", o.reason)
	return nil
}

// stopOnAgent tries a few times: short of an agent that is down, the caller
// should not have to come again.
func (c *ControlPlane) stopOnAgent(ctx context.Context, id sandbox.ID) error {
	for try := 1; ; try++ {
		_, err := c.cfg.Agent.StopSandbox(ctx, &hostagent.StopSandboxRequest{SandboxId: string(id)})
		if err == nil {
			return nil
		}
		err = agentError("stop sandbox", err)
		if try == 3 || !errors.Is(err, sandbox.ErrUnavailable) || ctx.Err() != nil {
			return err
		}
		select {
		case <-time.After(time.Duration(try) * 100 * time.Millisecond):
		case <-ctx.Done():
			return err
		}
	}
}

// fail records that a sandbox ended by itself; the agent has freed it already.
func (c *ControlPlane) fail(ctx context.Context, id sandbox.ID, from sandbox.State, reason string, at time.Time) error {
	if at.IsZero() {
		at = time.Now()
	}
	err := c.boxes.Transition(ctx, id, from, store.Change{State: sandbox.Failed, Reason: reason, Ended: at})
	if err != nil {
		return err
	}
	c.forget(id)
	c.log.Warn("sandbox ended by itself", "sandbox", id, "reason", reason)
	return nil
}

// EndAll ends every sandbox of the host that runs, for a platform that is going
// away. Those that are paused, or are being paused, stay.
func (c *ControlPlane) EndAll(ctx context.Context, reason string) error {
	c.ops.settled(ctx)
	live, err := c.boxes.List(ctx, store.Filter{HostID: c.cfg.HostID, States: []sandbox.State{
		sandbox.Pending, sandbox.Starting, sandbox.Running, sandbox.Stopping,
	}})
	if err != nil {
		return fmt.Errorf("list sandboxes to end: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, b := range live {
		g.Go(func() error {
			err := c.end(ctx, b.ID, outcome{state: sandbox.Stopped, reason: reason})
			if errors.Is(err, sandbox.ErrNotFound) {
				return nil // it has ended meanwhile
			}
			return err
		})
	}
	return g.Wait()
}
