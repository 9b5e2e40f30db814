package main

import (
	"fmt"
	"path/filepath"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
)

func newKernelCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "kernel",
		Short: "Install and list the kernels of virtual machines",
		Args:  cobra.ArbitraryArgs,
		RunE:  runGroup,
	}
	cmd.AddCommand(newKernelInstallCmd(), newKernelListCmd())
	return cmd
}

func newKernelInstallCmd() *cobra.Command {
	var opts kernel.Options
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install the kernel that new virtual machines boot",
		Long: `Install the kernel that new virtual machines boot: the distribution's for clouds,
which the host's apt downloads and checks, or one of your own. The host's own kernel
is not touched. Running and paused sandboxes keep the kernel they have.`,
		Example: `  wrenn kernel install
  wrenn kernel install --vmlinux ./vmlinux --modules ./lib/modules/6.12.1`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := filepath.Abs(dataFlag(cmd))
			if err != nil {
				return err
			}
			if !asJSON {
				opts.Progress = cmd.ErrOrStderr()
			}
			k, err := kernel.Install(cmd.Context(), dataDir(dir).kernels(), opts)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), k)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), k.Name)
			return err
		},
	}
	cmd.Flags().StringVar(&opts.Vmlinux, "vmlinux", "", "install this `file`, an ELF kernel or a bzImage, instead")
	cmd.Flags().StringVar(&opts.Modules, "modules", "", "`directory` with its modules; without, everything must be built in")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object")
	return cmd
}

func newKernelListCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List the kernels that are installed",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			dir, err := filepath.Abs(dataFlag(cmd))
			if err != nil {
				return err
			}
			kernels, err := kernel.List(dataDir(dir).kernels())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), kernels)
			}
			table := tabwriter.NewWriter(cmd.OutOrStdout(), 0, 0, 2, ' ', 0)
			fmt.Fprintln(table, "NAME\tVERSION\tCURRENT\tPVH\tSOURCE")
			for _, k := range kernels {
				fmt.Fprintf(table, "%s\t%s\t%v\t%v\t%s\n", k.Name, k.Version, k.Current, k.PVH, k.Source)
			}
			return table.Flush()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON array")
	return cmd
}
