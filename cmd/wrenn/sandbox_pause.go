package main

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
)

func newSandboxPauseCmd() *cobra.Command {
	var filesOnly bool
	cmd := &cobra.Command{
		Use:   "pause ID",
		Short: "Pause a sandbox until it is resumed",
		Long: `Pause a sandbox until it is resumed. It takes no memory and no CPU meanwhile, and
does not end by itself; its connections are closed.`,
		Args: idArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			id, err := findSandboxID(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			return noSandbox(id, c.Pause(cmd.Context(), id, !filesOnly))
		},
	}
	cmd.Flags().BoolVar(&filesOnly, "files-only", false, "keep its files only: resuming starts it anew, without its processes")
	return cmd
}

func newSandboxResumeCmd() *cobra.Command {
	var timeout time.Duration
	var cold bool
	cmd := &cobra.Command{
		Use:   "resume ID",
		Short: "Resume a paused sandbox",
		Long: `Resume a paused sandbox, with its processes as they were. One that runs goes on,
and lives for --timeout at least.`,
		Args: idArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
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
			_, _, err = c.Connect(cmd.Context(), id, client.ConnectRequest{Timeout: timeout, Cold: cold})
			return noSandbox(id, err)
		},
	}
	cmd.Flags().DurationVar(&timeout, "timeout", 5*time.Minute, "time to live from now")
	cmd.Flags().BoolVar(&cold, "cold", false, "start it anew from its files, without its processes")
	return cmd
}
