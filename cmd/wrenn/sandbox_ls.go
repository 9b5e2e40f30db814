package main

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
)

func newSandboxListCmd() *cobra.Command {
	var metadata, states []string
	var asJSON, quiet bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List sandboxes",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			query := client.ListQuery{States: states}
			for _, state := range states {
				if state != "running" && state != "paused" {
					return usageErrorf("--state %q: want running or paused", state)
				}
			}
			var err error
			if query.Metadata, err = parsePairs("--metadata", metadata); err != nil {
				return err
			}
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			all, err := c.ListAll(cmd.Context(), query)
			if err != nil {
				return err
			}
			switch {
			case asJSON:
				return printJSON(cmd.OutOrStdout(), append([]client.Info{}, all...)) // [] rather than null
			case quiet:
				for _, info := range all {
					fmt.Fprintln(cmd.OutOrStdout(), info.SandboxID)
				}
				return nil
			}
			return printTable(cmd.OutOrStdout(), sandboxRows(all, time.Now()))
		},
	}
	f := cmd.Flags()
	f.StringArrayVar(&metadata, "metadata", nil, "only those with this KEY=VALUE; may be repeated")
	f.StringSliceVar(&states, "state", nil, "only those in this state: running, paused")
	f.BoolVar(&asJSON, "json", false, "print a JSON array")
	f.BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	return cmd
}

func sandboxRows(all []client.Info, now time.Time) [][]string {
	rows := [][]string{{"ID", "TEMPLATE", "STATE", "CPUS", "MEMORY", "AGE", "ENDS IN", "METADATA"}}
	for _, info := range all {
		ends := max(0, info.EndAt.Sub(now)).Round(time.Second).String()
		if info.State == "paused" {
			ends = "-"
		}
		rows = append(rows, []string{
			info.SandboxID,
			cmp.Or(info.Alias, info.TemplateID),
			info.State,
			fmt.Sprint(info.CPUCount),
			fmt.Sprintf("%d MiB", info.MemoryMB),
			now.Sub(info.StartedAt).Round(time.Second).String(),
			ends,
			joinPairs(info.Metadata),
		})
	}
	return rows
}

// joinPairs returns the pairs as KEY=VALUE, in the order of their keys.
func joinPairs(pairs map[string]string) string {
	var list []string
	for _, key := range slices.Sorted(maps.Keys(pairs)) {
		list = append(list, key+"="+pairs[key])
	}
	return strings.Join(list, ",")
}
