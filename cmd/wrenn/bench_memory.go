package main

import (
	"context"
	"errors"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/bench"
)

// newMemoryBenchmark measures memory images and the pager without a platform.
func newMemoryBenchmark() *cobra.Command {
	o := bench.MemoryOptions{Samples: 30, SizeMiB: 128, PauseMiB: 1024}
	cmd := &cobra.Command{
		Use:   "memory",
		Short: "Memory images and the pager: page faults, working set, pause; needs root, but no platform",
		Long: `Measures memory images and the pager with processes that do what virtual machines
do with their memory, beside floors of their own. Files are written in the data
directory (--data) where it is there, else in the current one.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Samples < 1 || o.SizeMiB < 1 || o.PauseMiB < 1 {
				return usageErrorf("-n, --size and --pause-size: want at least 1")
			}
			if os.Geteuid() != 0 {
				return errors.New("the page faults of another process are served by root only: run it as root")
			}
			self, err := os.Executable()
			if err != nil {
				return err
			}
			o.Pager, o.Child = []string{self, "pager", "--socket"}, []string{self, "bench", "memory-child"}
			if o.Dir = dataFlag(cmd); unix.Access(o.Dir, unix.W_OK|unix.X_OK) != nil {
				o.Dir = "."
			}
			return printReport(cmd, func(ctx context.Context) (bench.Report, error) { return bench.Memory(ctx, o) })
		},
	}
	cmd.Flags().IntVarP(&o.Samples, "number", "n", o.Samples, "measurements of each kind")
	cmd.Flags().IntVar(&o.SizeMiB, "size", o.SizeMiB, "memory whose page faults are served, in MiB")
	cmd.Flags().IntVar(&o.PauseMiB, "pause-size", o.PauseMiB, "memory that is written, in MiB")
	return cmd
}

// newMemoryChildCmd is what `wrenn bench memory` starts: it plays a monitor.
func newMemoryChildCmd() *cobra.Command {
	return &cobra.Command{
		Use:    "memory-child",
		Hidden: true,
		Args:   cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return bench.ServeMemoryChild(cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}
