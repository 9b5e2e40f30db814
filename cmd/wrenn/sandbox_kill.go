package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// killsAtOnce is how many sandboxes are ended at the same time.
const killsAtOnce = 8

func newSandboxKillCmd() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:     "kill ID… | --all",
		Aliases: []string{"rm"},
		Short:   "End sandboxes, running or paused",
		Args: func(_ *cobra.Command, args []string) error {
			if all == (len(args) > 0) {
				return usageErrorf("want ids or --all")
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			if all {
				infos, err := c.ListAll(cmd.Context(), client.ListQuery{})
				if err != nil {
					return err
				}
				for _, info := range infos {
					args = append(args, info.SandboxID)
				}
			}
			return killSandboxes(cmd.Context(), c, args, all)
		},
	}
	cmd.Flags().BoolVar(&all, "all", false, "end all sandboxes, those that are paused too")
	return cmd
}

// killSandboxes ends all it can and returns what went wrong with the others. With
// goneIsFine a sandbox that has ended meanwhile is no failure.
func killSandboxes(ctx context.Context, c *client.Client, prefixes []string, goneIsFine bool) error {
	failures := make([]error, len(prefixes))
	var group errgroup.Group
	group.SetLimit(killsAtOnce)
	for i, prefix := range prefixes {
		group.Go(func() error {
			id, err := findSandboxID(ctx, c, prefix)
			if err == nil {
				err = c.Kill(ctx, id)
			}
			if err != nil && !(goneIsFine && errors.Is(err, sandbox.ErrNotFound)) {
				failures[i] = noSandbox(prefix, err)
			}
			return nil
		})
	}
	_ = group.Wait() // the failures are kept apart
	if err := errors.Join(failures...); err != nil {
		return fmt.Errorf("kill: %w", err)
	}
	return nil
}
