package controlplane

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

const (
	pauseLimit = 11 * time.Minute // for the agent to write a sandbox to disk
	// pauseAgain is what a sandbox gets whose time is over and that could not be
	// paused: it is not killed for that.
	pauseAgain = time.Minute
)

// Pause writes the team's running sandbox to disk, with its memory or only its
// files, and frees everything else. One that does not run gives
// sandbox.ErrConflict. When it fails the sandbox runs on.
func (c *ControlPlane) Pause(ctx context.Context, teamID string, id sandbox.ID, memory bool) error {
	b, err := c.running(ctx, teamID, id)
	if err != nil {
		return err
	}
	if err := c.checkDisk(ctx, teamID); err != nil {
		return err
	}
	finish, err := c.claimPause(ctx, b, memory, store.Change{Cause: "paused by request"})
	if err != nil {
		return err
	}
	return finish()
}

// claimPause records that the sandbox is being paused, from when on it is
// unreachable, and returns the rest of the work, which goes on whatever becomes of
// ctx.
func (c *ControlPlane) claimPause(ctx context.Context, b sandbox.Sandbox, memory bool, change store.Change) (finish func() error, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pauseLimit)
	_, done := c.ops.beginMove(b.ID, cancel)
	if done == nil {
		cancel()
		return nil, sandbox.Errorf(sandbox.ErrConflict, "sandbox %q is in transition; try again in a moment", b.ID)
	}
	change.State, change.MemoryKept = sandbox.Pausing, &memory
	if err := c.boxes.Transition(ctx, b.ID, sandbox.Running, change); err != nil {
		cancel()
		done()
		return nil, err
	}
	if b.Spec.AutoResume && memory {
		c.sleep(b)
	} else {
		c.forget(b.ID)
	}
	return func() error {
		defer cancel()
		resp, err := c.cfg.Agent.PauseSandbox(ctx, &hostagent.PauseSandboxRequest{SandboxId: string(b.ID), FilesOnly: !memory})
		if err != nil {
			err = agentError("pause sandbox", err)
			c.settle(b.ID, "it could not be paused: "+reasonOf(err), done)
			return err
		}
		size := resp.GetImageBytes()
		if err := c.boxes.Transition(ctx, b.ID, sandbox.Pausing, store.Change{State: sandbox.Paused, ImageBytes: &size, Cause: kept(memory)}); err != nil {
			c.settleUnrecorded(b.ID, kept(memory), err, done)
			return fmt.Errorf("record sandbox as paused: %w", err)
		}
		done()
		c.log.Info("sandbox paused", "sandbox", b.ID, "memory", memory)
		return nil
	}, nil
}

func kept(memory bool) string {
	if memory {
		return "memory and files are kept"
	}
	return "files are kept"
}

// reasonOf is what users may see of an error.
func reasonOf(err error) string {
	if text, public := sandbox.Message(err); public {
		return text
	}
	return "the host could not do it"
}

const (
	settleLimit = 2 * time.Minute
	settleWait  = 3 * time.Second        // that a caller waits for it
	settleRetry = 100 * time.Millisecond // first wait; it doubles up to settleMost
	settleMost  = 2 * time.Second
)

// settle brings the record of a sandbox in transition to what the agent says of
// it, after a move that came to nothing. It asks until the agent answers and is
// through with it itself, and calls done then, which ends the move; after a long
// time the reconciler takes over. It returns earlier if that takes a while.
func (c *ControlPlane) settle(id sandbox.ID, cause string, done func()) {
	over := make(chan struct{})
	c.background.Go(func() {
		defer close(over)
		defer done()
		c.settleLoop(id, cause)
	})
	select {
	case <-over:
	case <-time.After(settleWait):
	}
}

// settleUnrecorded is settle for a move that the agent has made and whose record
// failed with err. Where that has gone another way, by a kill, there is nothing to
// settle.
func (c *ControlPlane) settleUnrecorded(id sandbox.ID, cause string, err error, done func()) {
	if ignoreLost(err) == nil {
		done()
		return
	}
	c.settle(id, cause, done)
}

func (c *ControlPlane) settleLoop(id sandbox.ID, cause string) {
	ctx, cancel := context.WithTimeout(context.Background(), settleLimit)
	defer cancel()
	for wait := settleRetry; ; wait = min(2*wait, settleMost) {
		settled, err := c.settleOnce(ctx, id, cause)
		if settled {
			return
		}
		select {
		case <-ctx.Done():
			c.log.Warn("settle sandbox", "sandbox", id, "err", err)
			return
		case <-c.stopping: // the next process does it
			return
		case <-time.After(wait):
		}
	}
}

// settleOnce reports whether the sandbox is not in transition any more.
func (c *ControlPlane) settleOnce(ctx context.Context, id sandbox.ID, cause string) (bool, error) {
	b, err := c.boxes.Get(ctx, id)
	if errors.Is(err, sandbox.ErrNotFound) {
		return true, nil
	}
	if err != nil || b.State != sandbox.Pausing && b.State != sandbox.Resuming {
		return err == nil, err
	}
	have, err := c.listAgent(ctx)
	if err != nil {
		return false, err
	}
	switch s := have[id]; sandbox.State(s.GetState()) {
	case sandbox.Pausing, sandbox.Resuming, sandbox.Stopping:
		return false, nil
	default:
		err = c.settleAs(ctx, b, s, cause)
		return err == nil || errors.Is(err, sandbox.ErrConflict), err
	}
}

// settleInBackground is settle for what an earlier process has left.
func (c *ControlPlane) settleInBackground(wg *sync.WaitGroup, id sandbox.ID, cause string) {
	_, done := c.ops.beginMove(id, func() {})
	if done == nil {
		return // somebody is at it
	}
	wg.Go(func() {
		defer done()
		c.settleLoop(id, cause)
	})
}

// settleAs is settle for a record and what the agent says, nil if it knows nothing.
func (c *ControlPlane) settleAs(ctx context.Context, b sandbox.Sandbox, s *hostagent.SandboxStatus, cause string) error {
	if b.State != sandbox.Pausing && b.State != sandbox.Resuming {
		return nil
	}
	switch state := sandbox.State(s.GetState()); {
	case s == nil:
		return c.fail(ctx, b.ID, b.State, "lost: its host does not have it any more", time.Time{})
	case state.Final():
		return c.fail(ctx, b.ID, b.State, endReason(s), s.GetChangedAt().AsTime())
	case state == sandbox.Running:
		ends := b.Ends
		if now := time.Now(); b.State == sandbox.Resuming {
			ends = now.Add(b.Spec.Timeout)
		} else if ends.Before(now) {
			ends = now.Add(pauseAgain)
		}
		// An agent that was restarted meanwhile does not know the token.
		if err := c.giveToken(ctx, b); err != nil {
			return err
		}
		return c.nowRunning(ctx, b, store.Change{Address: s.GetAddress(), Ends: ends, Cause: cause, ImageBytes: new(int64)})
	case state == sandbox.Paused:
		change := store.Change{State: sandbox.Paused, Cause: cause}
		if size := s.GetImageBytes(); size > 0 {
			change.ImageBytes = &size
		}
		if err := c.boxes.Transition(ctx, b.ID, b.State, change); err != nil {
			return err
		}
		if wakes(b) { // it may have been taken for running in between
			c.sleep(b)
		}
		return nil
	}
	return nil // the agent is at it
}
