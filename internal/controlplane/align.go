package controlplane

import (
	"context"
	"sync"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// differs reports whether a sandbox runs by its record and is paused on the agent,
// or the other way round: a request was cut off in a way that nobody learned of.
func differs(b sandbox.Sandbox, s *hostagent.SandboxStatus) bool {
	switch state := sandbox.State(s.GetState()); b.State {
	case sandbox.Running:
		return state == sandbox.Paused
	case sandbox.Paused:
		return state == sandbox.Running
	}
	return false
}

// alignInBackground brings a record that differs from the agent to what the agent
// has, by the way that the sandbox went.
func (c *ControlPlane) alignInBackground(ctx context.Context, wg *sync.WaitGroup, id sandbox.ID) {
	_, done := c.ops.beginMove(id, func() {})
	if done == nil {
		return // somebody is at it
	}
	wg.Go(func() {
		defer done()
		if err := c.align(ctx, id); err != nil && ctx.Err() == nil {
			c.log.Warn("bring record to what the host agent has", "sandbox", id, "err", err)
		}
	})
}

// align has registered the move: from now on nobody else changes the two.
func (c *ControlPlane) align(ctx context.Context, id sandbox.ID) error {
	const cause = "found so on the host"
	b, err := c.boxes.Get(ctx, id)
	if err != nil {
		return ignoreLost(err)
	}
	have, err := c.listAgent(ctx)
	if err != nil {
		return err
	}
	if !differs(b, have[id]) {
		return nil // it was on its way when it was looked at
	}
	via := sandbox.Pausing
	if b.State == sandbox.Paused {
		via = sandbox.Resuming
	}
	// What is kept of it was recorded when its pause was begun.
	if err := c.boxes.Transition(ctx, id, b.State, store.Change{State: via, Cause: cause}); err != nil {
		return ignoreLost(err)
	}
	if b.State = via; wakes(b) {
		c.sleep(b)
	} else {
		c.forget(id)
	}
	c.settleLoop(id, cause)
	return nil
}
