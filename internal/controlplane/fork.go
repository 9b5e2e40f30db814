package controlplane

import (
	"context"
	"maps"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/sandbox"
)

const (
	// MaxForks is how many sandboxes one call can fork.
	MaxForks    = 100
	forksAtOnce = 8
)

// Forked is the outcome of one fork.
type Forked struct {
	Sandbox sandbox.Sandbox
	Err     error // why there is none
}

// Fork makes count sandboxes that go on from where the team's sandbox is now, each
// by itself, and lives for timeout. The source is not touched; what it does later
// the others do not see. The error is of the fork as a whole: then there is none.
func (c *ControlPlane) Fork(ctx context.Context, teamID string, id sandbox.ID, count int, timeout time.Duration) ([]Forked, error) {
	if count < 1 || count > MaxForks {
		return nil, sandbox.Errorf(sandbox.ErrInvalid, "count must be between 1 and %d", MaxForks)
	}
	if err := c.checkTimeout(timeout); err != nil {
		return nil, err
	}
	source, err := c.steady(ctx, teamID, id)
	if err != nil {
		return nil, err
	}
	if err := c.checkSandboxes(ctx, teamID, count); err != nil {
		return nil, err
	}
	// The image is nobody's but this call's: it has no record.
	image, err := c.snapshotOf(ctx, source, "")
	if err != nil {
		return nil, err
	}
	release := c.ops.useImage(image.ID)
	defer release()
	defer func() {
		if err := c.deleteImage(ctx, image.ID); err != nil {
			c.log.Warn("delete image of fork", "image", image.ID, "err", err) // the reconciler will
		}
	}()
	if _, err := c.writeImage(ctx, source.ID, image.ID); err != nil {
		return nil, err
	}
	forks := make([]Forked, count)
	var g errgroup.Group
	g.SetLimit(forksAtOnce)
	for i := range forks {
		g.Go(func() error {
			child := source
			child.Spec.Metadata = maps.Clone(source.Spec.Metadata)
			child.Spec.Timeout, child.SourceID = timeout, source.ID
			forks[i].Sandbox, forks[i].Err = c.launch(ctx, child, startFrom{image: &image})
			return nil
		})
	}
	_ = g.Wait() // each fork has its own error
	return forks, nil
}
