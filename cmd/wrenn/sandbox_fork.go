package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

// mostForks is how many copies the platform makes at once.
const mostForks = 100

func newSandboxForkCmd() *cobra.Command {
	var count int
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "fork ID",
		Short: "Make copies of a sandbox and print their ids",
		Long: `Make copies of a sandbox and print their ids, one a line. The copies have its files
and its processes, all as they were at one moment; the sandbox itself goes on.

Where some copies could not be made the ids of the others are printed, and the exit
code is 1.`,
		Args: idArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if count < 1 || count > mostForks {
				return usageErrorf("-n %d: want 1 to %d", count, mostForks)
			}
			if timeout <= 0 {
				return usageErrorf("--timeout must be more than nothing")
			}
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			id, err := findSandboxID(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			forks, err := c.Fork(cmd.Context(), id, count, timeout)
			if err != nil {
				return noSandbox(id, err)
			}
			var failures []error
			for _, fork := range forks {
				if fork.Err != nil {
					failures = append(failures, fork.Err)
					continue
				}
				if _, err := fmt.Fprintln(cmd.OutOrStdout(), fork.Sandbox.SandboxID); err != nil {
					return err
				}
			}
			if len(failures) > 0 {
				return fmt.Errorf("%d of %d copies could not be made: %w", len(failures), len(forks), errors.Join(failures...))
			}
			return nil
		},
	}
	cmd.Flags().IntVarP(&count, "number", "n", 1, "how many copies, 100 at most")
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "time to live of each")
	return cmd
}
