package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/spf13/cobra"
)

func newAgentCmd() *cobra.Command {
	var (
		opts      upOptions
		cidr, dns string
		allow     []string
	)
	cmd := &cobra.Command{
		Use:   "agent",
		Short: "Start the host agent alone, for `wrenn server` on the same host",
		Long: `Start the host agent alone: it owns the sandboxes of this host. The control plane
is ` + "`wrenn server`" + ` with the same data directory; the two meet at a socket in it and
may start in any order. Either can be stopped, replaced or killed while the other
goes on.

Ctrl-C ends the agent and its running sandboxes. SIGTERM ends only the agent: the
sandboxes go on and the next start takes them over.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := opts.parseAgent(cidr, allow, dns); err != nil {
				return err
			}
			dir, err := openDataDir(dataFlag(cmd))
			if err != nil {
				return err
			}
			p := newPlatform(dir, opts, newLogger(os.Stderr))
			if err := p.prepareAgent(cmd.Context()); err != nil {
				return err
			}
			return runForeground(cmd.Context(), part{
				name: "wrenn agent", data: dir, lock: dataDir(dir.agent()),
				start: func(ctx context.Context, _ io.Writer, _ *slog.Logger) (*platform, error) {
					return p.startAgentAlone(ctx)
				},
				ready: func(*platform) string { return fmt.Sprintf("The host agent is up (data in %s).", dir) },
			}, opts)
		},
	}
	opts.addAgentFlags(cmd.Flags(), &cidr, &allow, &dns)
	return cmd
}

// startAgentAlone starts the host agent at its socket.
func (p *platform) startAgentAlone(ctx context.Context) (_ *platform, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, p.stop(false))
		}
	}()
	if err := p.dir.keepPrivate(); err != nil {
		return nil, err
	}
	at, err := p.dir.listenAgent()
	if err != nil {
		return nil, err
	}
	p.onStop(func(context.Context) error {
		_ = at.Close() // closed already when it was served
		return nil
	})
	return p, p.serveAgent(ctx, at)
}
