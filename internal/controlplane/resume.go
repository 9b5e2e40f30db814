package controlplane

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"time"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// ConnectRequest is how a sandbox is to be made usable.
type ConnectRequest struct {
	Timeout time.Duration
	Memory  *bool // false: a paused one boots from its files, even where its memory was kept
}

// ResumeRequest is how a paused sandbox is to go on.
type ResumeRequest struct {
	Timeout   time.Duration
	AutoPause *bool // nil: as before
	Memory    *bool // as in ConnectRequest
}

// Connect makes the team's sandbox run at least until the timeout from now, and
// says whether it had to be resumed for that. It waits for a pause or a resume
// under way.
func (c *ControlPlane) Connect(ctx context.Context, teamID string, id sandbox.ID, req ConnectRequest) (b sandbox.Sandbox, resumed bool, err error) {
	if err := c.checkTimeout(req.Timeout); err != nil {
		return b, false, err
	}
	for {
		b, err = c.owned(ctx, teamID, id)
		switch {
		case err != nil:
			return b, false, err
		case b.State.Final():
			return b, false, errGone(b)
		case b.State == sandbox.Running:
			b.Ends, err = c.boxes.ExtendEnds(ctx, id, time.Now().Add(req.Timeout))
			if !errors.Is(err, sandbox.ErrConflict) {
				return b, false, err
			}
		case b.State == sandbox.Paused:
			b, err = c.resume(ctx, b, resumption{timeout: req.Timeout, boot: boots(req.Memory), cause: "resumed by request"})
			if !errors.Is(err, errInTransition) {
				return b, err == nil, err
			}
		default:
			if err := c.awaitMove(ctx, b); err != nil {
				return b, false, err
			}
		}
	}
}

// Resume lets the team's paused sandbox go on. One that is not paused gives
// sandbox.ErrConflict.
func (c *ControlPlane) Resume(ctx context.Context, teamID string, id sandbox.ID, req ResumeRequest) (sandbox.Sandbox, error) {
	if err := c.checkTimeout(req.Timeout); err != nil {
		return sandbox.Sandbox{}, err
	}
	for {
		b, err := c.owned(ctx, teamID, id)
		switch {
		case err != nil:
			return b, err
		case b.State.Final():
			return b, errGone(b)
		case b.State == sandbox.Pausing:
			if err := c.awaitMove(ctx, b); err != nil {
				return b, err
			}
			continue
		case b.State != sandbox.Paused:
			return b, sandbox.Errorf(sandbox.ErrConflict, "sandbox %q is %s", id, b.State)
		}
		return c.resume(ctx, b, resumption{timeout: req.Timeout, boot: boots(req.Memory), autoPause: req.AutoPause, cause: "resumed by request"})
	}
}

func boots(memory *bool) bool { return memory != nil && !*memory }

// errInTransition says that somebody else is at it.
var errInTransition = sandbox.Errorf(sandbox.ErrConflict, "the sandbox is in transition; try again in a moment")

// awaitMove waits until b is not in transition any more.
func (c *ControlPlane) awaitMove(ctx context.Context, b sandbox.Sandbox) error {
	mv := c.ops.move(b.ID)
	if mv == nil {
		now, err := c.boxes.Get(ctx, b.ID)
		if err != nil || now.State != b.State {
			return err // it is over already
		}
		// Nobody here is at it: the rest of a crash, which the reconciler settles,
		// or an end.
		return sandbox.Errorf(sandbox.ErrConflict, "sandbox %q is %s; try again in a moment", b.ID, b.State)
	}
	select {
	case <-mv.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// resumption is how one sandbox is resumed.
type resumption struct {
	timeout   time.Duration
	boot      bool
	autoPause *bool
	cause     string
}

// resume lets the paused sandbox b go on. Once begun it is seen through whatever
// becomes of ctx: others may be waiting for it. errInTransition: somebody else was
// faster.
func (c *ControlPlane) resume(ctx context.Context, b sandbox.Sandbox, o resumption) (sandbox.Sandbox, error) {
	if err := c.checkSandboxes(ctx, b.TeamID, 1); err != nil {
		return b, err
	}
	waiting := ctx
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), createLimit)
	defer cancel()
	other, done := c.ops.beginMove(b.ID, cancel)
	if done == nil {
		select {
		case <-other.done:
		case <-waiting.Done():
			return b, waiting.Err()
		}
		return b, errInTransition
	}
	settling := false
	defer func() {
		if !settling {
			done()
		}
	}()
	err := c.boxes.Transition(ctx, b.ID, sandbox.Paused, store.Change{State: sandbox.Resuming, Cause: o.cause, AutoPause: o.autoPause})
	if errors.Is(err, sandbox.ErrConflict) {
		return b, errInTransition
	}
	if err != nil {
		return b, err
	}
	if o.autoPause != nil {
		b.Spec.AutoPause = *o.autoPause
	}
	b.State = sandbox.Resuming
	req := &hostagent.ResumeSandboxRequest{SandboxId: string(b.ID), Boot: o.boot}
	if b.Spec.Secured {
		req.AccessToken = c.AccessToken(b.ID)
	}
	resp, err := c.cfg.Agent.ResumeSandbox(ctx, req)
	if err != nil {
		err = agentError("resume sandbox", err)
		settling = true
		c.settle(b.ID, "it could not be resumed: "+reasonOf(err), done)
		return b, err
	}
	b.Address, b.EnvdVersion, b.Ends = resp.GetAddress(), resp.GetEnvdVersion(), time.Now().Add(o.timeout)
	cause := "memory and processes are as they were"
	if resp.GetBooted() {
		cause = "booted from its files"
	}
	err = c.nowRunning(ctx, b, store.Change{Address: b.Address, EnvdVersion: b.EnvdVersion, Ends: b.Ends, Cause: cause, ImageBytes: new(int64)})
	if err != nil {
		settling = true
		c.settleUnrecorded(b.ID, cause, err, done)
		return b, fmt.Errorf("record sandbox as running: %w", err)
	}
	b.State = sandbox.Running
	return b, nil
}

// nowRunning records that b, in transition, runs, and makes it reachable.
func (c *ControlPlane) nowRunning(ctx context.Context, b sandbox.Sandbox, change store.Change) error {
	addr, err := netip.ParseAddr(change.Address)
	if err != nil {
		return fmt.Errorf("host agent gave an unusable address: %w", err)
	}
	// Reachable before it is recorded as running: a kill may come from then on,
	// and what it forgets must not be remembered after it.
	c.remember(b, addr)
	change.State = sandbox.Running
	if err := c.boxes.Transition(context.WithoutCancel(ctx), b.ID, b.State, change); err != nil {
		c.forget(b.ID)
		return err
	}
	if !change.Ends.IsZero() {
		c.expiry.changed(change.Ends)
	}
	return nil
}

// wake resumes a sandbox because a request came for it, and says where it is
// reached. Of many at once one does it, and the others wait.
func (c *ControlPlane) wake(ctx context.Context, id sandbox.ID) (proxy.Target, error) {
	for {
		b, err := c.boxes.Get(ctx, id)
		if err != nil {
			return proxy.Target{}, err
		}
		switch b.State {
		case sandbox.Running:
			addr, err := netip.ParseAddr(b.Address)
			return c.target(b, addr), err
		case sandbox.Paused:
			_, err = c.resume(ctx, b, resumption{timeout: b.Spec.Timeout, cause: "a request came for it"})
			if err != nil && !errors.Is(err, errInTransition) {
				return proxy.Target{}, err
			}
		case sandbox.Pausing, sandbox.Resuming:
			if err := c.awaitMove(ctx, b); err != nil {
				return proxy.Target{}, err
			}
		default:
			return proxy.Target{}, errGone(b)
		}
	}
}
