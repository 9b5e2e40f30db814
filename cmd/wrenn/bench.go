package main

import (
	"cmp"
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/bench"
	"github.com/wrenn/wrenn/internal/client"
)

func newBenchCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "bench",
		Short: "Measure the platform that runs on this host, and its parts, each figure beside its floor",
		Args:  cobra.ArbitraryArgs,
		RunE:  runGroup,
	}
	cmd.PersistentFlags().Bool("json", false, "print one JSON object")
	cmd.AddCommand(
		newBenchmark("lifecycle", "Create, first output, exec and kill, beside bare runsc", 40, "sandboxes to measure", bench.Lifecycle),
		newBenchmark("density", "Memory and CPU of idle sandboxes", 100, "sandboxes at once", bench.Density),
		newBenchmark("churn", "Create and kill in a loop: failures, leaks, growth", 500, "cycles", bench.Churn),
		newBenchmark("microvm", "Boot, pause, resume and fork of virtual machines, beside bare QEMU", 5, "machines to measure", bench.MicroVM),
		newTerminalBenchmark(),
		newTerminalPartCmd(),
		newEnvdBenchmark(),
		newEnvdFloorCmd(),
		newProxyBenchmark(),
		newProxyServeCmd(),
		newMemoryBenchmark(),
		newMemoryChildCmd(),
	)
	return cmd
}

func newBenchmark(name, short string, n int, what string, run func(context.Context, bench.Platform, int) (bench.Report, error)) *cobra.Command {
	cmd := &cobra.Command{
		Use:   name,
		Short: short,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if n < 1 || n > 10000 {
				return usageErrorf("-n: want 1 to 10000")
			}
			return benchPlatform(cmd, func(ctx context.Context, p bench.Platform) (bench.Report, error) { return run(ctx, p, n) })
		},
	}
	cmd.Flags().IntVarP(&n, "number", "n", n, what)
	return cmd
}

// benchPlatform runs a benchmark of the platform of the data directory.
func benchPlatform(cmd *cobra.Command, run func(context.Context, bench.Platform) (bench.Report, error)) error {
	if os.Geteuid() != 0 {
		return errors.New("benchmarks look at the platform's processes and make bare sandboxes beside it: run them as root")
	}
	p := bench.Platform{DataDir: dataFlag(cmd)}
	creds, err := client.LoadCredentials(dataDir(p.DataDir).credentials())
	if err != nil {
		return err
	}
	p.DataURL = cmp.Or(creds.SandboxURL, creds.APIURL)
	p.Client, err = client.New(client.Config{APIURL: creds.APIURL, SandboxURL: creds.SandboxURL, APIKey: creds.APIKey})
	if err != nil {
		return err
	}
	defer p.Client.Close()
	return printReport(cmd, func(ctx context.Context) (bench.Report, error) { return run(ctx, p) })
}

// printReport runs a benchmark, which Ctrl-C ends, and prints what it found.
func printReport(cmd *cobra.Command, run func(context.Context) (bench.Report, error)) error {
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	report, err := run(ctx)
	if err != nil {
		return err
	}
	if asJSON, _ := cmd.Flags().GetBool("json"); asJSON {
		return report.WriteJSON(cmd.OutOrStdout())
	}
	return report.WriteTable(cmd.OutOrStdout())
}

// newEnvdBenchmark measures the guest agent without a platform: it needs neither
// one that runs nor root.
func newEnvdBenchmark() *cobra.Command {
	o := bench.EnvdOptions{Samples: 200, SizeMiB: 1024, Transfers: 8, StreamMiB: 100, Settle: 90 * time.Second}
	cmd := &cobra.Command{
		Use:   "envd",
		Short: "The guest agent alone, on the loopback interface: exec, echo, files, output, memory",
		Long: `Runs the guest agent on a loopback address of this host, without a platform or
a sandbox around it, and measures it beside floors of its own. Files are written
in the data directory (--data) where it is there, else in the current one.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Samples < 1 || o.Samples > bench.MaxEnvdSamples {
				return usageErrorf("-n: want 1 to %d", bench.MaxEnvdSamples)
			}
			if o.SizeMiB < 1 || o.Transfers < 1 {
				return usageErrorf("--size and --transfers: want at least 1")
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			o.Floor = []string{self, "bench", "envd-floor"}
			if o.Dir = dataFlag(cmd); unix.Access(o.Dir, unix.W_OK|unix.X_OK) != nil {
				o.Dir = "."
			}
			return printReport(cmd, func(ctx context.Context) (bench.Report, error) { return bench.Envd(ctx, o) })
		},
	}
	cmd.Flags().IntVarP(&o.Samples, "number", "n", o.Samples, "processes to run and keys to type")
	cmd.Flags().IntVar(&o.SizeMiB, "size", o.SizeMiB, "size of a file that is transferred, in MiB")
	cmd.Flags().IntVar(&o.Transfers, "transfers", o.Transfers, "transfers of each kind")
	return cmd
}

// newEnvdFloorCmd is what `wrenn bench envd` starts beside the agent.
func newEnvdFloorCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "envd-floor DIR",
		Hidden: true,
		Args:   cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return bench.ServeEnvdFloor(cmd.InOrStdin(), cmd.OutOrStdout(), args[0])
		},
	}
}
