package bench

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
)

// Churn makes and kills n sandboxes, 8 at a time, and looks for failures, for
// what is left behind, and for memory and descriptors that grow.
func Churn(ctx context.Context, p Platform, n int) (Report, error) {
	r := Report{Bench: "churn", Host: thisHost(runtimeName)}
	pid, err := p.pid()
	if err != nil {
		return r, err
	}
	const parallel = 8
	var (
		mu       sync.Mutex
		cycle    samples
		failed   atomic.Int64
		firstErr error
	)
	run := func(count int) error {
		var g errgroup.Group
		g.SetLimit(parallel)
		for range count {
			g.Go(func() error {
				if ctx.Err() != nil {
					return ctx.Err()
				}
				begin := time.Now()
				err := oneCycle(ctx, p)
				mu.Lock()
				defer mu.Unlock()
				cycle.addMillis(time.Since(begin))
				if err != nil {
					failed.Add(1)
					firstErr = errors.Join(firstErr, err)
				}
				return nil
			})
		}
		return g.Wait()
	}
	had, err := holdings(p.DataDir)
	if err != nil {
		return r, err
	}
	// The first tenth fills caches and pools; growth is measured after it.
	if err := run(max(n/10, parallel)); err != nil {
		return r, err
	}
	before, err := readProcess(pid)
	if err != nil {
		return r, fmt.Errorf("measure platform: %w", err)
	}
	begin := time.Now()
	rest := n - max(n/10, parallel)
	if err := run(rest); err != nil {
		return r, err
	}
	took := time.Since(begin)
	after, err := readProcess(pid)
	if err != nil {
		return r, fmt.Errorf("measure platform: %w", err)
	}
	left, err := holdings(p.DataDir)
	if err != nil {
		return r, err
	}
	// Sandboxes of others that were there before are not ours.
	left = slices.DeleteFunc(left, func(s string) bool { return slices.Contains(had, s) })
	growth := mib(after.pss - before.pss)
	cycles := cycle.result("create, exec, kill", "ms").noted("%d at a time", parallel)
	failures := single("failures", "cycles", float64(failed.Load())).want("0", failed.Load() == 0)
	if firstErr != nil {
		failures = failures.noted("%v", firstErr)
	}
	r.Results = []Result{
		cycles,
		single("cycles per second", "1/s", float64(rest)/took.Seconds()),
		failures,
		single("left behind", "things", float64(len(left))).want("0", len(left) == 0).noted("%v", left),
		single("platform's memory before", "MiB", mib(before.pss)),
		single("platform's memory growth", "MiB", growth).want("≤ 16", growth <= 16),
		single("platform's descriptors growth", "descriptors", float64(after.fds-before.fds)).
			want("≤ 16", after.fds-before.fds <= 16).noted("pooled connections come and go"),
	}
	return r, nil
}

func oneCycle(ctx context.Context, p Platform) error {
	s, err := p.create(ctx)
	if err != nil {
		return fmt.Errorf("create: %w", err)
	}
	err = firstOutput(ctx, s, "/bin/echo", "hello")
	return errors.Join(err, p.Client.Kill(context.WithoutCancel(ctx), s.ID()))
}

// holdings lists what sandboxes have: directories and processes.
func holdings(dataDir string) ([]string, error) {
	var left []string
	entries, err := os.ReadDir(filepath.Join(dataDir, "agent", "sandboxes"))
	if err != nil {
		return nil, fmt.Errorf("look at what sandboxes have: %w", err)
	}
	for _, e := range entries {
		left = append(left, "directory "+e.Name())
	}
	procs, err := processesOf(filepath.Join(dataDir, "agent", "runsc"))
	if err != nil {
		return nil, fmt.Errorf("look at what sandboxes have: %w", err)
	}
	for pid := range procs {
		left = append(left, fmt.Sprintf("process %d", pid))
	}
	return left, nil
}
