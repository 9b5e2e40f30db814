package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"time"
)

// measureStream has a process print much. Its floor is a pipe.
func (b *envdBench) measureStream(ctx context.Context) error {
	size := int64(b.StreamMiB) * mebibyte
	script := fmt.Sprintf("yes | head -c %d", size)
	var rate, floor samples
	for range b.Transfers {
		took, err := timed(func() error { return pipeOutput(ctx, script, size) })
		if err != nil {
			return fmt.Errorf("pipe: %w", err)
		}
		floor.addRate(size, took)
		var got int64
		took, err = timed(func() (err error) {
			got, err = b.streamOutput(ctx, script, nil)
			return err
		})
		if err == nil && got != size {
			err = fmt.Errorf("%d bytes came instead of %d", got, size)
		}
		if err != nil {
			return err
		}
		rate.addRate(size, took)
	}
	b.report(rate.result("output", "MiB/s").beside(floor).
		noted("%d MiB of `yes` through a Start stream with JSON, whose bytes are base64; floor: a pipe", b.StreamMiB))

	// Eight times while the process could go on, and once for long. What no
	// buffer takes meanwhile must wait, and none of it may be lost.
	slept := 0
	pause := func(total int64) time.Duration {
		if total*8/size <= int64(slept) {
			return 0
		}
		slept++
		if slept == 4 {
			return time.Second
		}
		return 100 * time.Millisecond
	}
	got, err := b.streamOutput(ctx, script, pause)
	exact := err == nil && got == size
	result := single("output intact, reader sleeps", "MiB", mib(got)).
		want(fmt.Sprintf("byte-exact, %d", b.StreamMiB), exact).noted("reader slept %d times, 1 s once and 100 ms otherwise", slept)
	if !exact {
		result = result.noted("%d of %d bytes; %v", got, size, err)
	}
	b.report(result)
	return ctx.Err()
}

// yes is what the program of this name prints.
var yes = []byte("y\n")

// pipeOutput reads the script's output from a pipe.
func pipeOutput(ctx context.Context, script string, size int64) error {
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", script)
	pipe, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	c := newYesChecker()
	_, err = io.CopyBuffer(c, struct{ io.Reader }{pipe}, make([]byte, 32<<10))
	if err = errors.Join(err, cmd.Wait()); err != nil {
		return err
	}
	return c.want(size)
}

// newYesChecker checks with a block that is long enough to compare fast.
func newYesChecker() *checker {
	block := make([]byte, 64<<10)
	for i := range block {
		block[i] = yes[i%len(yes)]
	}
	return &checker{block: block}
}

// streamOutput reads the script's output through the agent and returns how many
// bytes came as they should. After each event it waits for what pause says.
func (b *envdBench) streamOutput(ctx context.Context, script string, pause func(total int64) time.Duration) (int64, error) {
	s, err := b.agent.wire.start(ctx, command(b.dir, "/bin/sh", "-c", script))
	if err != nil {
		return 0, err
	}
	defer s.close()
	c := newYesChecker()
	for {
		ev, err := s.next()
		if err != nil {
			return c.n, err
		}
		if ev.End != nil {
			return c.n, s.end(ev)
		}
		if ev.Data == nil {
			continue
		}
		if len(ev.Data.Stderr) > 0 {
			return c.n, fmt.Errorf("the script complains: %s", ev.Data.Stderr)
		}
		if _, err := c.Write(ev.Data.Stdout); err != nil {
			return c.n, err
		}
		if pause == nil {
			continue
		}
		if d := pause(c.n); d > 0 {
			select {
			case <-time.After(d):
			case <-ctx.Done():
				return c.n, ctx.Err()
			}
		}
	}
}

// measureMemory looks at the agent after all that was asked of it. It gives
// memory back some time after it was busy.
func (b *envdBench) measureMemory(ctx context.Context) error {
	const goal = 16 * mebibyte
	busy, err := b.agent.status()
	if err != nil {
		return err
	}
	begin := time.Now()
	tick := time.NewTicker(500 * time.Millisecond)
	defer tick.Stop()
	now := busy
	for now.rss > goal && time.Since(begin) < b.Settle {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if now, err = b.agent.status(); err != nil {
			return err
		}
	}
	b.report(
		single("RSS after everything", "MiB", mib(busy.rss)).noted("at once; the peak was %.1f", mib(now.peak)),
		single("idle RSS after everything", "MiB", mib(now.rss)).want("≤ 16", now.rss <= goal).
			noted("%s later; looked at for up to %s", time.Since(begin).Round(time.Second), b.Settle),
	)
	return nil
}
