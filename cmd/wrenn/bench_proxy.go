package main

import (
	"context"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/bench"
)

// newProxyBenchmark measures the data plane's front without a platform: it needs
// neither one that runs nor root.
func newProxyBenchmark() *cobra.Command {
	o := bench.ProxyOptions{Round: time.Second, Rounds: 7, Idle: 10000}
	cmd := &cobra.Command{
		Use:   "proxy",
		Short: "The data plane's front as one hop on the loopback interface, beside nginx; idle WebSockets",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Round <= 0 || o.Rounds < 1 || o.Idle < 1 {
				return usageErrorf("--round, --rounds and --idle: want more than 0")
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			o.Serve = []string{self, "bench", "proxy-serve"}
			return printReport(cmd, func(ctx context.Context) (bench.Report, error) { return bench.Proxy(ctx, o) })
		},
	}
	cmd.Flags().DurationVar(&o.Round, "round", o.Round, "length of one measurement")
	cmd.Flags().IntVar(&o.Rounds, "rounds", o.Rounds, "measurements of each kind")
	cmd.Flags().IntVar(&o.Idle, "idle", o.Idle, "WebSockets held at once")
	return cmd
}

// newProxyServeCmd is what `wrenn bench proxy` starts: the proxy that is measured.
func newProxyServeCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "proxy-serve DIR",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return bench.ServeProxy(cmd.InOrStdin(), cmd.OutOrStdout(), args[0])
		},
	}
}
