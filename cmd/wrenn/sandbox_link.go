package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/spf13/cobra"
)

func newSandboxLinkCmd() *cobra.Command {
	var expires time.Duration
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "link ID PORT",
		Short: "Make a URL at which anybody reaches a port for a while",
		Long: `Make a URL at which anybody reaches a port of a sandbox for a while, also where
the ports are protected. Whoever has the URL has access: it cannot be taken back
but by ending the sandbox.`,
		Example: `  wrenn sandbox link 4x2k 3000
  wrenn sandbox link 4x2k 3000 --expires 15m`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageErrorf("want the id of a sandbox and a port, got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			port, err := strconv.ParseUint(args[1], 10, 16)
			if err != nil || port == 0 {
				return usageErrorf("port %q: want 1 to 65535", args[1])
			}
			if expires <= 0 {
				return usageErrorf("--expires must be more than nothing")
			}
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			id, err := findSandboxID(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			link, err := c.PreviewLink(cmd.Context(), id, uint16(port), expires)
			if err != nil {
				return noSandbox(id, err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), link)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), link.URL)
			return err
		},
	}
	f := cmd.Flags()
	f.DurationVar(&expires, "expires", time.Hour, "how long it holds, 7 days (168h) at most")
	f.BoolVar(&asJSON, "json", false, "print a JSON object")
	return cmd
}
