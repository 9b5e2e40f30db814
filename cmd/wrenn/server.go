package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"
)

func newServerCmd() *cobra.Command {
	var opts upOptions
	cmd := &cobra.Command{
		Use:   "server",
		Short: "Start control plane and data plane alone, for `wrenn agent` on the same host",
		Long: `Start control plane and data plane alone. The sandboxes are those of ` + "`wrenn agent`" + `
with the same data directory; while that is not there, what needs it is answered with
503.

Ctrl-C and SIGTERM end the server; the sandboxes go on.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := opts.parseServer(); err != nil {
				return err
			}
			if cmd.Flags().Changed("access-log") {
				if err := opts.parseAccessLog(); err != nil {
					return err
				}
			}
			dir, err := openDataDir(dataFlag(cmd))
			if err != nil {
				return err
			}
			return runForeground(cmd.Context(), part{
				name: "wrenn server", data: dir, lock: dir,
				start: func(ctx context.Context, progress io.Writer, log *slog.Logger) (*platform, error) {
					p := newPlatform(dir, opts, log)
					p.remote = true
					return p.start(ctx, progress)
				},
				ready: func(p *platform) string { return fmt.Sprintf("The server is up at %s (data in %s).", p.apiURL, dir) },
			}, opts)
		},
	}
	opts.addServerFlags(cmd.Flags())
	return cmd
}
