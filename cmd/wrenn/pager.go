package main

import (
	"cmp"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/memory/pager"
)

// lastToGo is the pager's oom_score_adj: when the host has no memory left, the kernel
// ends one virtual machine rather than the pager, which would be all of them.
const lastToGo = "-999"

func newPagerCmd() *cobra.Command {
	var socket string
	cmd := &cobra.Command{
		Use:   "pager",
		Short: "Serve the memory of resumed virtual machines (the host agent starts it)",
		Long: `Serves the page faults of virtual machines that were resumed from a memory image,
for all those of a host agent. The agent starts it, and it goes on when the agent
ends. A virtual machine cannot go on without it: when the pager ends, by Ctrl-C or
SIGTERM, those that it serves end too.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			debug.SetMemoryLimit(pager.OwnMemory())
			signal.Ignore(syscall.SIGHUP)
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			// Else it is "exe" to who lists processes.
			_ = os.WriteFile("/proc/self/comm", []byte("wrenn"), 0)
			log := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			if err := os.WriteFile("/proc/self/oom_score_adj", []byte(lastToGo), 0); err != nil {
				log.Warn("the kernel may end the pager before the machines that it serves when memory is short", "err", err)
			}
			at := cmp.Or(socket, dataDir(dataFlag(cmd)).pagerSocket())
			return pager.Serve(ctx, at, log, func() { pager.PrintReady(cmd.OutOrStdout()) })
		},
	}
	cmd.Flags().StringVar(&socket, "socket", "", "where it listens (default: agent/pager.sock in the data directory)")
	return cmd
}
