package main

import (
	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
)

func newSandboxEventsCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "events [ID]",
		Short: "Tell what happened to a sandbox, or to all, also to those that are gone",
		Long: `Tell what happened to a sandbox, or to all: when it got into which state, why, and
how long it had been in the one before. A sandbox that is gone is named by its
whole id.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usageErrorf("want the id of one sandbox at most, got %d arguments", len(args))
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			id := ""
			if len(args) > 0 {
				if id, err = findSandboxID(cmd.Context(), c, args[0]); err != nil {
					return err
				}
			}
			events, err := c.Events(cmd.Context(), id)
			if err != nil {
				return noSandbox(id, err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), append([]client.Event{}, events...)) // [] rather than null
			}
			return printTable(cmd.OutOrStdout(), eventRows(events))
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON array")
	return cmd
}

func eventRows(events []client.Event) [][]string {
	rows := [][]string{{"TIME", "SANDBOX", "STATE", "AFTER", "CAUSE"}}
	for _, e := range events {
		after := "-"
		if e.From != "" {
			after = e.Duration().String() + " " + e.From
		}
		rows = append(rows, []string{e.Time.Local().Format("2006-01-02 15:04:05.000"), e.SandboxID, e.State, after, e.Cause})
	}
	return rows
}
