package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
)

// shellLease is how long at least a sandbox lives on while somebody is in it.
const shellLease = 5 * time.Minute

func newSandboxShellCmd() *cobra.Command {
	var user string
	cmd := &cobra.Command{
		Use:   "shell ID",
		Short: "Open a shell in a sandbox",
		Long: `Open a login shell (bash) in a sandbox. While it is open the sandbox does not
run into its timeout.`,
		Args: idArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return &exitError{exitPlatform, err}
			}
			info, err := findAwake(cmd.Context(), c, args[0])
			if err != nil {
				return exitStatus(client.Exit{}, err)
			}
			ctx, cancel := context.WithCancel(cmd.Context())
			defer cancel()
			refresh := func(ctx context.Context) error { return c.Refresh(ctx, info.SandboxID, shellLease) }
			if err := refresh(ctx); err != nil {
				return exitStatus(client.Exit{}, err)
			}
			go keepAlive(ctx, shellLease, refresh)
			return runInSandbox(ctx, c, info, &attachment{
				command:     client.Command{Path: "/bin/bash", Args: []string{"-il"}, User: user},
				interactive: true,
				tty:         true,
			})
		},
	}
	cmd.Flags().StringVarP(&user, "user", "u", "", "user to be (default: the template's)")
	return cmd
}
