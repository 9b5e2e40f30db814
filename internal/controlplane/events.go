package controlplane

import (
	"context"
	"errors"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// Events returns what happened to the team's sandbox, also to one that is long
// gone. The filter's TeamID and SandboxID are ignored.
func (c *ControlPlane) Events(ctx context.Context, teamID string, id sandbox.ID, f store.EventFilter) ([]sandbox.Event, error) {
	f.TeamID, f.SandboxID = teamID, id
	events, err := c.cfg.Store.Events().List(ctx, f)
	if err != nil || len(events) > 0 {
		return events, err
	}
	first, err := c.cfg.Store.Events().List(ctx, store.EventFilter{TeamID: teamID, SandboxID: id, Limit: 1})
	if err == nil && len(first) == 0 {
		_, err = c.owned(ctx, teamID, id)
	}
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil, sandbox.Errorf(sandbox.ErrNotFound, "sandbox %q not found", id)
	}
	return nil, err
}

// TeamEvents returns what happened to all of the team's sandboxes.
func (c *ControlPlane) TeamEvents(ctx context.Context, teamID string, f store.EventFilter) ([]sandbox.Event, error) {
	f.TeamID = teamID
	return c.cfg.Store.Events().List(ctx, f)
}
