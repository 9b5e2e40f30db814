package main

import (
	"context"
	"os"
	"os/signal"
	"strconv"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/bench"
)

// newTerminalBenchmark measures what applications in a sandbox do to a terminal
// in it.
func newTerminalBenchmark() *cobra.Command {
	o := bench.TerminalOptions{Keys: 1200, Rounds: 4}
	cmd := &cobra.Command{
		Use:   "terminal",
		Short: "Keystrokes in a terminal, idle and beside an application at full load",
		Long: `Types into a terminal of a sandbox and measures how long each key takes to come
back through the whole platform: with nothing else going on, beside 50 downloads
whose readers have stopped, and with an application in the same sandbox under full
load: WebSockets, polls, downloads, uploads. The load is held to 60 % of the
machine's processors. Then the same with everything on one HTTP/2 connection.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Keys < 1 || o.Keys > 100000 {
				return usageErrorf("-n: want 1 to 100000")
			}
			if o.Rounds < 1 || o.Rounds > o.Keys {
				return usageErrorf("--rounds: want 1 to as many as there are keys")
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			o.Self = []string{self, "bench", "terminal-part"}
			return benchPlatform(cmd, func(ctx context.Context, p bench.Platform) (bench.Report, error) {
				return bench.Terminal(ctx, p, o)
			})
		},
	}
	cmd.Flags().IntVarP(&o.Keys, "number", "n", o.Keys, "keys to type in each state")
	cmd.Flags().IntVar(&o.Rounds, "rounds", o.Rounds, "rounds in which they are typed, all states in turn in each")
	return cmd
}

// newTerminalPartCmd is what `wrenn bench terminal` starts beside itself and in
// the sandbox.
func newTerminalPartCmd() *cobra.Command {
	return &cobra.Command{
		Use:       "terminal-part app|load|relay [URL WINDOW]",
		Hidden:    true,
		Args:      cobra.RangeArgs(1, 3),
		ValidArgs: []string{"app", "load", "relay"},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGTERM)
			defer stop()
			switch part := args[0]; {
			case part == "app" && len(args) == 1:
				return bench.ServeTerminalApp(ctx, cmd.OutOrStdout())
			case part == "load" && len(args) == 1:
				return bench.RunTerminalLoad(cmd.InOrStdin(), cmd.OutOrStdout())
			case part == "relay" && len(args) == 3:
				window, err := strconv.Atoi(args[2])
				if err != nil {
					return usageErrorf("%q is not a window", args[2])
				}
				return bench.ServeTerminalRelay(cmd.InOrStdin(), cmd.OutOrStdout(), args[1], window)
			}
			return usageErrorf("want app, load, or relay with URL and window")
		},
	}
}
