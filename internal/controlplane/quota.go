package controlplane

import (
	"context"
	"fmt"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// takesHost are the states in which a sandbox takes memory and processors.
var takesHost = []sandbox.State{
	sandbox.Pending, sandbox.Starting, sandbox.Running, sandbox.Pausing, sandbox.Resuming, sandbox.Stopping,
}

// checkSandboxes refuses more sandboxes at once than the team may have. Calls at
// the same moment may go beyond it by as many.
func (c *ControlPlane) checkSandboxes(ctx context.Context, teamID string, more int) error {
	most := c.cfg.Limits.TeamSandboxes
	if most == 0 {
		return nil
	}
	n, err := c.boxes.Count(ctx, store.Filter{TeamID: teamID, States: takesHost})
	if err != nil {
		return fmt.Errorf("count sandboxes: %w", err)
	}
	if n+more > most {
		return sandbox.Errorf(sandbox.ErrExhausted, "your team may have %d sandboxes running at once and has %d; kill or pause some", most, n)
	}
	return nil
}

// checkDisk refuses more images when those of the team, paused sandboxes' included,
// take all that they may. One image may go beyond it.
func (c *ControlPlane) checkDisk(ctx context.Context, teamID string) error {
	most := c.cfg.Limits.TeamImageBytes
	if most == 0 {
		return nil
	}
	snapshots, err := c.cfg.Store.Snapshots().TeamBytes(ctx, teamID)
	if err != nil {
		return fmt.Errorf("measure snapshots: %w", err)
	}
	paused, err := c.boxes.ImageBytes(ctx, teamID)
	if err != nil {
		return fmt.Errorf("measure paused sandboxes: %w", err)
	}
	if used := snapshots + paused; used >= most {
		return sandbox.Errorf(sandbox.ErrExhausted, "the snapshots and paused sandboxes of your team may take %d MiB and take %d; delete some", most>>20, used>>20)
	}
	return nil
}
