package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
)

func newSandboxInfoCmd() *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "info ID",
		Short: "Describe a sandbox",
		Args:  idArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			info, err := findSandbox(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), info)
			}
			return printTable(cmd.OutOrStdout(), [][]string{
				{"id", info.SandboxID},
				{"template", info.TemplateID},
				{"alias", info.Alias},
				{"state", info.State},
				{"cpus", fmt.Sprint(info.CPUCount)},
				{"memory", fmt.Sprintf("%d MiB", info.MemoryMB)},
				{"disk", fmt.Sprintf("%d MiB", info.DiskSizeMB)},
				{"started", info.StartedAt.Format(time.RFC3339)},
				{end(info), info.EndAt.Format(time.RFC3339)},
				{"timeout", onTimeout(info)},
				{"ports", ports(info)},
				{"envd", info.EnvdVersion},
				{"metadata", joinPairs(info.Metadata)},
			})
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object, access tokens included")
	return cmd
}

// end names what info's EndAt is the time of.
func end(info client.Info) string {
	if info.State == "paused" {
		return "paused"
	}
	return "ends"
}

// onTimeout says what happens to the sandbox by itself.
func onTimeout(info client.Info) string {
	if info.Lifecycle == nil {
		return ""
	}
	if info.Lifecycle.AutoResume {
		return info.Lifecycle.OnTimeout + ", requests wake it"
	}
	return info.Lifecycle.OnTimeout
}

// ports says who may reach the sandbox's ports.
func ports(info client.Info) string {
	if info.TrafficAccessToken != "" {
		return "protected"
	}
	return "public"
}

// idArgs checks that there is one id.
func idArgs(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return usageErrorf("want the id of one sandbox, got %d arguments", len(args))
	}
	return nil
}
