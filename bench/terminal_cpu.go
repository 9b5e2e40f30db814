package bench

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/time/rate"
)

// cpuMeter measures how busy the machine is, whoever keeps it so.
type cpuMeter struct{ busy, total uint64 }

// used returns the share of all processors that was in use since the last call,
// 0 to 1; the first call says nothing.
func (m *cpuMeter) used() (float64, error) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := bytes.Cut(text, []byte("\n"))
	fields := bytes.Fields(line)
	if len(fields) < 9 || string(fields[0]) != "cpu" {
		return 0, fmt.Errorf("/proc/stat begins with %q", line)
	}
	// proc(5): user, nice, system, idle, iowait, irq, softirq, steal. What follows
	// is part of these.
	var now cpuMeter
	for i, field := range fields[1:9] {
		ticks, err := strconv.ParseUint(string(field), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read /proc/stat: %w", err)
		}
		now.total += ticks
		if i != 3 && i != 4 {
			now.busy += ticks
		}
	}
	busy, total := now.busy-m.busy, now.total-m.total
	*m = now
	if total == 0 {
		return 0, nil
	}
	return float64(busy) / float64(total), nil
}

const (
	governorTick = 250 * time.Millisecond
	leastRate    = 1 * mebibyte // bytes per second of all transfers together
	mostRate     = 64 << 30
	transferUnit = 64 << 10 // bytes that are moved at once

	// governorMargin of the limit is aimed at: it is a limit and not a mean.
	governorMargin = .95
)

// governor slows transfers down so far that the machine is used up to a limit.
type governor struct {
	limit   float64 // share of the machine, 0 to 1
	limiter *rate.Limiter
	moved   func() int64 // bytes transferred so far
}

func newGovernor(limit, bytesPerSecond float64, moved func() int64) *governor {
	return &governor{
		limit:   limit * governorMargin,
		limiter: rate.NewLimiter(rate.Limit(max(bytesPerSecond, leastRate)), 4*transferUnit),
		moved:   moved,
	}
}

// run adapts the rate until ctx ends.
func (g *governor) run(ctx context.Context) error {
	var cpu cpuMeter
	if _, err := cpu.used(); err != nil {
		return err
	}
	tick := time.NewTicker(governorTick)
	defer tick.Stop()
	smooth, before := g.limit, g.moved()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
		used, err := cpu.used()
		if err != nil {
			return err
		}
		smooth += (used - smooth) / 4
		now := g.moved()
		reached := float64(now-before) / governorTick.Seconds()
		before = now
		// As fast up as down, so that the mean is at the limit, and never far above
		// what is reached, or it would take long to come down from there.
		next := float64(g.limiter.Limit()) * min(max(g.limit/smooth, 1/1.2), 1.2)
		next = min(next, 2*max(reached, leastRate), mostRate)
		g.limiter.SetLimit(rate.Limit(max(next, leastRate)))
	}
}
