package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/wrenn/wrenn/internal/agent"
	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/memory/pager"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
)

func newDownCmd() *cobra.Command {
	return &cobra.Command{
		Use:   "down",
		Short: "Stop the platform and end its sandboxes",
		Long: `Stop the platform of a data directory and end its sandboxes, also those that a
platform that is not running any more has left. Templates, records, snapshots and
paused sandboxes stay.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return down(cmd.Context(), dataFlag(cmd), cmd.OutOrStdout())
		},
	}
}

func down(ctx context.Context, data string, out io.Writer) (err error) {
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
	lock, was, err := stopAndLock(ctx, dir)
	if err != nil {
		return fmt.Errorf("%w; its log is %s", err, dir.log())
	}
	defer lock.release()
	// A host agent that is a process of its own, and that a service manager may be
	// about to start again.
	if err := os.MkdirAll(dir.agent(), 0o700); err != nil {
		return fmt.Errorf("make agent directory: %w", err)
	}
	agentLock, wasAgent, err := stopAndLock(ctx, dataDir(dir.agent()))
	if err != nil {
		return err
	}
	defer func() {
		agentLock.release()
		// Where the agent's directory is a file system of its own, it is closed with it.
		err = errors.Join(err, disk.Unmount(dir.agent(), dir.disks()))
	}()
	was = was || wasAgent
	// Even when one was running: it may have been the one that was killed.
	if err := endLeftovers(ctx, dir); err != nil {
		return fmt.Errorf("end what was left: %w", err)
	}
	if was {
		fmt.Fprintln(out, "Wrenn is down and its running sandboxes are gone.")
	} else {
		fmt.Fprintln(out, "No platform was running; what it may have left is gone.")
	}
	return nil
}

// stopAndLock stops who has the lock in dir and takes its place. Others may be about
// the same: then it waits for them. was says whether a platform was running.
func stopAndLock(ctx context.Context, dir dataDir) (lock *instanceLock, was bool, err error) {
	for {
		stopped, err := stopRunning(ctx, dir, syscall.SIGINT)
		if err != nil {
			return nil, was, err
		}
		was = was || stopped
		if lock, err = acquireLock(dir); !errors.Is(err, errLocked) {
			return lock, was, err
		}
	}
}

// endLeftovers ends the sandboxes that run without a platform, and removes what
// a killed one had prepared. It goes by names on the host alone, so that nothing
// in the data directory can keep it from that, damaged or gone. The records of
// the sandboxes are corrected by the next platform.
func endLeftovers(ctx context.Context, dir dataDir) error {
	// The processes before their networks, their files last.
	if err := gvisor.RemoveAll(dir.runsc(), dir.tag()); err != nil {
		return err
	}
	if err := microvm.RemoveAll(dir.tag()); err != nil {
		return err
	}
	if err := pager.End(ctx, dir.pagerSocket()); err != nil {
		return err
	}
	if err := network.RemoveAll(ctx, dir.tag()); err != nil {
		return err
	}
	return agent.RemoveRunning(dir.agent())
}
