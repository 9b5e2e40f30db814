package envd

import (
	"context"
	"errors"

	"github.com/wrenn/wrenn/internal/envd/cgroup"
)

// runProcesses prepares the system for the processes that the agent starts, and
// calls serve: each gets a cgroup, and the agent goes before all of them. What the
// system does not have is done without.
func (a *Agent) runProcesses(ctx context.Context, serve func() error) error {
	if a.prefer {
		if err := a.reaper.Prefer(); err != nil {
			a.log.Info("the agent has no precedence over its processes", "error", err)
		}
	}
	root := a.cgroups
	if root == "" && a.ownsMachine {
		found, err := cgroup.Find()
		if err != nil {
			a.log.Info("processes have no cgroups", "error", err)
			return serve()
		}
		root = found
	}
	if root == "" {
		return serve()
	}
	tree, err := cgroup.New(root)
	if err != nil {
		if errors.Is(err, cgroup.ErrNone) {
			a.log.Info("processes have no cgroups", "error", err)
		} else {
			a.log.Warn("processes have no cgroups", "error", err)
		}
		return serve()
	}
	a.reaper.Group(tree)
	ctx, cancel := context.WithCancel(ctx)
	emptying := make(chan struct{})
	go func() {
		defer close(emptying)
		tree.Run(ctx)
	}()
	defer func() {
		cancel()
		<-emptying
	}()
	return serve()
}
