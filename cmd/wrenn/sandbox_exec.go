package main

import (
	"context"
	"errors"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
)

func newSandboxExecCmd() *cobra.Command {
	var command commandOptions
	cmd := &cobra.Command{
		Use:   "exec [flags] ID -- COMMAND [ARG…]",
		Short: "Run a command in a sandbox that is there already",
		Long: `Run a command in a sandbox that is there already, which stays.

Streams, signals and exit codes are those of wrenn run; a second Ctrl-C kills the
command. The sandbox's time to live is not changed.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("no sandbox given: want ID -- COMMAND [ARG…]")
			}
			return commandArgs(cmd, execArgs(args))
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			attached, err := command.attachment(execArgs(args))
			if err != nil {
				return err
			}
			c, err := connect(cmd)
			if err != nil {
				return &exitError{exitPlatform, err}
			}
			info, err := findAwake(cmd.Context(), c, args[0])
			if err != nil {
				return exitStatus(client.Exit{}, err)
			}
			return runInSandbox(cmd.Context(), c, info, attached)
		},
	}
	cmd.Flags().SetInterspersed(false)
	command.register(cmd)
	return cmd
}

// execArgs returns what follows the id, without the dashes before the command:
// flag parsing stops at the id and leaves them.
func execArgs(args []string) []string {
	if rest := args[1:]; len(rest) > 0 && rest[0] == "--" {
		return rest[1:]
	}
	return args[1:]
}

// runInSandbox runs the command in a sandbox that outlives it. A command that
// nobody is attached to any more is killed, unless it is paused with its sandbox.
func runInSandbox(ctx context.Context, c *client.Client, info client.Info, a *attachment) error {
	signals, stop := watchSignals()
	defer stop()
	a.signals = signals
	exit, err := a.run(ctx, c.Sandbox(info))
	var started *exitError
	if p := a.process.Load(); p != nil && err != nil && !errors.As(err, &started) {
		if err = explainLoss(ctx, c, info.SandboxID, err); errors.As(err, new(errPaused)) {
			return exitStatus(exit, err) // a signal would wake it, or find it gone
		}
		killCtx, cancel := context.WithTimeout(context.WithoutCancel(ctx), signalTimeout)
		defer cancel()
		_ = p.Signal(killCtx, syscall.SIGKILL) // fails when it is gone, or the sandbox is
	}
	return exitStatus(exit, err)
}
