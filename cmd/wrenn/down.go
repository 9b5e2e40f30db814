package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
)

func newDownCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Stop the platform and end its sandboxes",
		Long: `Stop the platform of a data directory and end its sandboxes, also those that a
platform that is not running any more has left. Templates and records stay.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return down(cmd.Context(), dataFlag(cmd), cmd.OutOrStdout())
		},
	}
}

func down(ctx context.Context, data string, out io.Writer) error {
	if _, err := os.Stat(data); errors.Is(err, os.ErrNotExist) {
		fmt.Fprintf(out, "Nothing to stop: there is no %s.\n", data)
		return nil
	}
	dir, err := openDataDir(data)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	was, err := stopRunning(ctx, dir, syscall.SIGINT)
	if err != nil {
		return fmt.Errorf("%w; its log is %s", err, dir.log())
	}
	// Even when one was running: it may have been the one that was killed, and
	// what it left is ended by starting and stopping in its place.
	if err := endLeftovers(ctx, dir); err != nil {
		return err
	}
	if was {
		fmt.Fprintln(out, "Wrenn is down and its sandboxes are gone.")
	} else {
		fmt.Fprintln(out, "No platform was running; what it may have left is gone.")
	}
	return nil
}

// endLeftovers ends the sandboxes that run without a platform, and removes what
// a killed one had prepared.
func endLeftovers(ctx context.Context, dir dataDir) error {
	lock, err := acquireLock(dir)
	if err != nil {
		return err
	}
	defer lock.release()
	left, err := os.ReadDir(dir.sandboxes())
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("look for sandboxes: %w", err)
	}
	if len(left) > 0 {
		last, err := readLock(dir)
		if err != nil {
			return err
		}
		// As the last platform was started: the slots are in its address range.
		last.Options.ReadySlots = 1
		a, rt, err := openAgent(ctx, dir, last.Options, newLogger(io.Discard))
		if err != nil {
			return fmt.Errorf("take over what was left: %w", err)
		}
		if err := errors.Join(a.Shutdown(ctx), rt.Close()); err != nil {
			return err
		}
	}
	return errors.Join(network.RemoveAll(ctx, dir.tag()), gvisor.RemoveAll(dir.runsc(), dir.tag()))
}
