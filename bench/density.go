package bench

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"
)

// Density measures what idle sandboxes take from the host: n at once, memory by
// the kernel's own accounting, the platform's share apart.
func Density(ctx context.Context, p Platform, n int) (_ Report, err error) {
	r := Report{Bench: "density", Host: thisHost(runtimeName)}
	pid, err := p.pid()
	if err != nil {
		return r, err
	}
	before, err := takeStock(p, pid)
	if err != nil {
		return r, err
	}
	var ids []string
	defer func() { err = errors.Join(err, killAll(context.WithoutCancel(ctx), p, ids)) }()

	created := make(chan string, n)
	begin := time.Now()
	var g errgroup.Group
	g.SetLimit(4)
	for range n {
		g.Go(func() error {
			s, err := p.create(ctx)
			if err != nil {
				return err
			}
			created <- s.ID()
			return nil
		})
	}
	err = g.Wait()
	close(created)
	for id := range created {
		ids = append(ids, id)
	}
	if err != nil {
		return r, fmt.Errorf("%d of %d sandboxes made: %w", len(ids), n, err)
	}
	took := time.Since(begin)
	progress("density: %d sandboxes in %s", n, took.Round(time.Millisecond))

	// What start-up used settles while we watch how much idling costs.
	const watch = 15 * time.Second
	settled, err := takeStock(p, pid)
	if err != nil {
		return r, err
	}
	select {
	case <-time.After(watch):
	case <-ctx.Done():
		return r, ctx.Err()
	}
	after, err := takeStock(p, pid)
	if err != nil {
		return r, err
	}
	count := float64(n)
	idle := func(a, b time.Duration) float64 { return 100 * float64(b-a) / float64(watch) }
	r.Results = []Result{
		single("idle sandboxes at once", "sandboxes", count),
		single("host memory per sandbox", "MiB", mib(before.available-after.available)/count).
			noted("by MemAvailable, everything included"),
		single("processes' memory per sandbox", "MiB", mib(after.sandboxes-before.sandboxes)/count).
			noted("PSS of sandbox kernel and file server"),
		single("platform's memory per sandbox", "MiB", mib(after.platform.pss-before.platform.pss)/count),
		single("platform's memory", "MiB", mib(after.platform.pss)).noted("PSS of the platform process with %d sandboxes", n),
		single("CPU of idle sandboxes", "% of one CPU", idle(settled.sandboxCPU, after.sandboxCPU)).noted("all %d together", n),
		single("CPU of the idle platform", "% of one CPU", idle(settled.platform.cpu, after.platform.cpu)),
		single("creates per second", "1/s", count/took.Seconds()).noted("4 at a time"),
	}
	return r, nil
}

// stock is what the host has left and what the platform takes.
type stock struct {
	available  int64 // bytes, as are the others
	sandboxes  int64
	sandboxCPU time.Duration
	platform   process
}

func takeStock(p Platform, pid int) (stock, error) {
	var s stock
	var err error
	if s.platform, err = readProcess(pid); err != nil {
		return s, fmt.Errorf("measure platform: %w", err)
	}
	procs, err := processesOf(filepath.Join(p.DataDir, "agent", "runsc"))
	if err != nil {
		return s, fmt.Errorf("measure sandboxes: %w", err)
	}
	for _, q := range procs {
		s.sandboxes += q.pss
		s.sandboxCPU += q.cpu
	}
	if s.available, err = availableMemory(); err != nil {
		return s, fmt.Errorf("measure memory: %w", err)
	}
	return s, nil
}

func killAll(ctx context.Context, p Platform, ids []string) error {
	var g errgroup.Group
	g.SetLimit(8)
	for _, id := range ids {
		g.Go(func() error { return p.Client.Kill(ctx, id) })
	}
	return g.Wait()
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }
