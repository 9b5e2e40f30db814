package main

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/bench"
	"github.com/wrenn/wrenn/internal/client"
)

func newBenchCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure the platform that runs on this host, each figure beside its floor",
		Args:  cobra.ArbitraryArgs,
		RunE:  runGroup,
	}
	cmd.PersistentFlags().Bool("json", false, "print one JSON object")
	cmd.AddCommand(
		newBenchmark("lifecycle", "Create, first output, exec and kill, beside bare runsc", 40, "sandboxes to measure", bench.Lifecycle),
		newBenchmark("density", "Memory and CPU of idle sandboxes", 100, "sandboxes at once", bench.Density),
		newBenchmark("churn", "Create and kill in a loop: failures, leaks, growth", 500, "cycles", bench.Churn),
	)
	return cmd
}

func newBenchmark(name, short string, n int, what string, run func(context.Context, bench.Platform, int) (bench.Report, error)) *cobra.Command {
	cmd := &cobra.Command{
		Use:   name,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if os.Geteuid() != 0 {
				return errors.New("benchmarks look at the platform's processes and make bare sandboxes beside it: run them as root")
			}
			if n < 1 || n > 10000 {
				return usageErrorf("-n: want 1 to 10000")
			}
			dir := dataFlag(cmd)
			creds, err := client.LoadCredentials(dataDir(dir).credentials())
			if err != nil {
				return err
			}
			c, err := client.New(client.Config{APIURL: creds.APIURL, SandboxURL: creds.SandboxURL, APIKey: creds.APIKey})
			if err != nil {
				return err
			}
			defer c.Close()
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			report, err := run(ctx, bench.Platform{Client: c, DataDir: dir}, n)
			if err != nil {
				return err
			}
			if asJSON, _ := cmd.Flags().GetBool("json"); asJSON {
				return report.WriteJSON(cmd.OutOrStdout())
			}
			return report.WriteTable(cmd.OutOrStdout())
		},
	}
	cmd.Flags().IntVarP(&n, "number", "n", n, what)
	return cmd
}
