package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func newSandboxCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "sandbox",
		Aliases: []string{"sb"},
		Short:   "Create, list, use, pause, copy and end sandboxes",
		Long: `Create, list, use, pause, copy and end sandboxes.

A sandbox is named by its id or by the beginning of it, as long as that fits only
one.`,
		Args: cobra.ArbitraryArgs,
		RunE: runGroup,
	}
	cmd.AddCommand(
		newSandboxListCmd(),
		newSandboxCreateCmd(),
		newSandboxInfoCmd(),
		newSandboxExecCmd(),
		newSandboxShellCmd(),
		newSandboxKillCmd(),
		newSandboxPauseCmd(),
		newSandboxResumeCmd(),
		newSandboxSnapshotCmd(),
		newSandboxForkCmd(),
		newSandboxEventsCmd(),
		newSandboxCopyCmd(),
		newSandboxLinkCmd(),
		newSandboxForwardCmd(),
	)
	return cmd
}

// findSandbox returns the sandbox with the given id or unambiguous prefix of one.
func findSandbox(ctx context.Context, c *client.Client, prefix string) (client.Info, error) {
	id, err := findSandboxID(ctx, c, prefix)
	if err != nil {
		return client.Info{}, err
	}
	info, err := c.Get(ctx, id)
	if err != nil {
		return client.Info{}, noSandbox(id, err)
	}
	return info, nil
}

// findAwake is findSandbox for whoever is about to use the sandbox. One that wakes
// by itself when it is used is woken.
func findAwake(ctx context.Context, c *client.Client, prefix string) (client.Info, error) {
	info, err := findSandbox(ctx, c, prefix)
	if err != nil || info.State != "paused" {
		return info, err
	}
	if info.Lifecycle == nil || !info.Lifecycle.AutoResume {
		return client.Info{}, errPaused(info.SandboxID)
	}
	info, _, err = c.Connect(ctx, info.SandboxID, client.ConnectRequest{})
	return info, err
}

// errPaused says that the sandbox of that id is paused.
type errPaused string

func (id errPaused) Error() string {
	return fmt.Sprintf("sandbox %s is paused: `wrenn sandbox resume %s` wakes it", string(id), string(id))
}

// findSandboxID makes a whole id of a prefix. One that is whole already is not
// looked up.
func findSandboxID(ctx context.Context, c *client.Client, prefix string) (string, error) {
	if prefix == "" || strings.Trim(prefix, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
		return "", usageErrorf("%q is not a sandbox id: `wrenn sandbox ls` shows them", prefix)
	}
	if len(prefix) >= sandbox.IDLength {
		return prefix, nil
	}
	all, err := c.ListAll(ctx, client.ListQuery{})
	if err != nil {
		return "", err
	}
	var matches []string
	for _, info := range all {
		if strings.HasPrefix(info.SandboxID, prefix) {
			matches = append(matches, info.SandboxID)
		}
	}
	switch len(matches) {
	case 0:
		return "", noSandbox(prefix, sandbox.ErrNotFound)
	case 1:
		return matches[0], nil
	}
	return "", fmt.Errorf("several sandboxes begin with %s: %s", prefix, strings.Join(matches, ", "))
}

// noSandbox words a not-found error; others it leaves as they are. Of a sandbox
// that has ended the platform says for a while why.
func noSandbox(id string, err error) error {
	if !errors.Is(err, sandbox.ErrNotFound) {
		return err
	}
	why := "`wrenn sandbox ls` shows those there are"
	var answer *client.APIError
	if errors.As(err, &answer) {
		if _, end, ok := strings.Cut(answer.Message, " not found: "); ok {
			why = printable(end)
		}
	}
	return &sandbox.Error{Kind: sandbox.ErrNotFound, Message: "no sandbox " + id + ": " + why}
}

// parsePairs reads KEY=VALUE.
func parsePairs(flag string, list []string) (map[string]string, error) {
	pairs := make(map[string]string)
	for _, item := range list {
		key, value, ok := strings.Cut(item, "=")
		if !ok || key == "" {
			return nil, usageErrorf("%s %q: want KEY=VALUE", flag, item)
		}
		pairs[key] = value
	}
	return pairs, nil
}

// printTable writes rows of cells in columns. Cells come from other people:
// characters that would steer a terminal are shown as escapes.
func printTable(w io.Writer, rows [][]string) error {
	table := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, row := range rows {
		for i, cell := range row {
			if i > 0 {
				fmt.Fprint(table, "\t")
			}
			fmt.Fprint(table, printable(cell))
		}
		fmt.Fprintln(table)
	}
	return table.Flush()
}

// printable returns s without anything that a terminal takes as a command.
func printable(s string) string {
	quoted := fmt.Sprintf("%+q", s)
	if quoted == `"`+s+`"` {
		return s
	}
	clean := fmt.Sprintf("%q", s)
	return strings.ReplaceAll(strings.ReplaceAll(clean[1:len(clean)-1], `\"`, `"`), `\\`, `\`)
}
