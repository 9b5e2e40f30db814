package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func newSandboxSnapshotCmd() *cobra.Command {
	var name string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "snapshot ID",
		Short: "Make a snapshot of a sandbox and print its id",
		Long: `Make a snapshot of a sandbox, running or paused, and print its id. The sandbox goes
on as it was. The snapshot stays until it is deleted; its id or its name is a
template to create sandboxes from.`,
		Example: `  wrenn sandbox snapshot 4x2k --name ready
  wrenn sandbox create --template ready`,
		Args: idArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			id, err := findSandboxID(cmd.Context(), c, args[0])
			if err != nil {
				return err
			}
			snapshot, err := c.Snapshot(cmd.Context(), id, name)
			if err != nil {
				return noSandbox(id, err)
			}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), snapshot)
			}
			_, err = fmt.Fprintln(cmd.OutOrStdout(), plainID(snapshot))
			return err
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "name for it, NAME or NAME:TAG; of several with one name the newest is used")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print a JSON object")
	return cmd
}

func newSnapshotCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "List and delete snapshots of sandboxes",
		Long: `List and delete snapshots of sandboxes. They are made by wrenn sandbox snapshot, and
used by wrenn sandbox create --template.`,
		Args: cobra.ArbitraryArgs,
		RunE: runGroup,
	}
	cmd.AddCommand(newSnapshotListCmd(), newSnapshotRemoveCmd())
	return cmd
}

func newSnapshotListCmd() *cobra.Command {
	var of, name string
	var asJSON, quiet bool
	cmd := &cobra.Command{
		Use:     "ls",
		Aliases: []string{"list"},
		Short:   "List snapshots, newest first",
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			query := client.SnapshotQuery{Name: name}
			if of != "" {
				if query.SandboxID, err = findSandboxID(cmd.Context(), c, of); err != nil {
					return err
				}
			}
			all, err := c.Snapshots(cmd.Context(), query)
			if err != nil {
				return err
			}
			switch {
			case asJSON:
				return printJSON(cmd.OutOrStdout(), append([]client.Snapshot{}, all...)) // [] rather than null
			case quiet:
				for _, snapshot := range all {
					fmt.Fprintln(cmd.OutOrStdout(), plainID(snapshot))
				}
				return nil
			}
			return printTable(cmd.OutOrStdout(), snapshotRows(all, time.Now()))
		},
	}
	f := cmd.Flags()
	f.StringVar(&of, "sandbox", "", "only those of this sandbox, which may be gone")
	f.StringVar(&name, "name", "", "only those of this name")
	f.BoolVar(&asJSON, "json", false, "print a JSON array")
	f.BoolVarP(&quiet, "quiet", "q", false, "print ids only")
	return cmd
}

func snapshotRows(all []client.Snapshot, now time.Time) [][]string {
	rows := [][]string{{"ID", "NAMES", "SANDBOX", "TEMPLATE", "KIND", "SIZE", "AGE"}}
	for _, s := range all {
		rows = append(rows, []string{
			plainID(s),
			strings.Join(s.Names, ","),
			s.SandboxID,
			cmp.Or(s.Alias, s.TemplateID),
			s.Kind,
			fmt.Sprintf("%d MiB", (s.SizeBytes+1<<20-1)>>20),
			now.Sub(s.CreatedAt).Round(time.Second).String(),
		})
	}
	return rows
}

// plainID is a snapshot's id without the tag that it has for E2B's clients.
func plainID(s client.Snapshot) string {
	return strings.TrimSuffix(s.SnapshotID, ":default")
}

func newSnapshotRemoveCmd() *cobra.Command {
	return &cobra.Command{
		Use:     "rm SNAPSHOT…",
		Aliases: []string{"delete"},
		Short:   "Delete snapshots, named by id or name",
		Long: `Delete snapshots, named by id or name. Sandboxes that were created from them stay,
and keep what they need of them.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usageErrorf("want ids or names of snapshots")
			}
			for _, ref := range args {
				if _, _, err := sandbox.ParseName(ref); err != nil {
					return usageErrorf("%q is not a snapshot: `wrenn snapshot ls` shows them", ref)
				}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := connect(cmd)
			if err != nil {
				return err
			}
			return deleteSnapshots(cmd.Context(), c, args)
		},
	}
}

// deleteSnapshots deletes all it can and returns what went wrong with the others.
func deleteSnapshots(ctx context.Context, c *client.Client, refs []string) error {
	var failures []error
	for _, ref := range refs {
		err := c.DeleteSnapshot(ctx, ref)
		if errors.Is(err, sandbox.ErrNotFound) {
			err = &sandbox.Error{Kind: sandbox.ErrNotFound, Message: "no snapshot " + ref + ": `wrenn snapshot ls` shows those there are"}
		}
		failures = append(failures, err)
	}
	return errors.Join(failures...)
}
