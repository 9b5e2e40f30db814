package bench

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/guest"
)

// EnvdOptions say what Envd measures and how long it takes.
type EnvdOptions struct {
	Dir       string   // where its files are made: on the disk that transfers go to
	Floor     []string // command that calls ServeEnvdFloor with the directory that is added to it
	Binary    string   // the guest agent; empty: the one embedded in this program
	Samples   int      // of what takes milliseconds; MaxEnvdSamples at most
	SizeMiB   int      // of one file
	Transfers int      // samples of each kind of transfer and of the stream
	StreamMiB int      // output of one stream

	Settle time.Duration // how long at most to wait for the agent to give memory back
}

// MaxEnvdSamples keeps the keystrokes within one line of a terminal, of which
// the kernel takes 4095 characters.
const MaxEnvdSamples = 3000

const envdWarmUp = 10

// mebibyte is in bytes.
const mebibyte = 1 << 20

// envdBench is one run of Envd and what it holds.
type envdBench struct {
	EnvdOptions
	binary string
	dir    string // of this run
	agent  *envdAgent
	floor  *envdFloor

	results []Result
}

// Envd measures the guest agent alone: the program itself on the loopback
// interface, without a platform or a sandbox around it.
func Envd(ctx context.Context, o EnvdOptions) (_ Report, err error) {
	r := Report{Bench: "envd", Host: thisHost("none")}
	// The agent runs in its own directory, and is told paths of this one.
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return r, fmt.Errorf("find directory: %w", err)
	}
	b := &envdBench{EnvdOptions: o, binary: o.Binary}
	if b.dir, err = os.MkdirTemp(o.Dir, "wrenn-bench-"); err != nil {
		return r, fmt.Errorf("make directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	if b.binary == "" {
		if b.binary, err = guest.Install(b.dir); err != nil {
			return r, err
		}
	}
	if b.floor, err = startEnvdFloor(ctx, o.Floor, b.dir); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, b.floor.stop()) }()
	if err := b.measureStart(ctx); err != nil {
		return r, fmt.Errorf("measure start: %w", err)
	}
	if b.agent, _, err = startEnvd(ctx, b.binary, b.dir); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, b.agent.stop()) }()
	if err := b.measureIdle(); err != nil {
		return r, fmt.Errorf("measure idle agent: %w", err)
	}
	if err := b.agent.wire.init(ctx, rand.Text()); err != nil {
		return r, fmt.Errorf("give the agent its token: %w", err)
	}
	for _, part := range []struct {
		name    string
		measure func(context.Context) error
	}{
		{"exec", b.measureExec},
		{"echo", b.measureEcho},
		{"transfers", b.measureTransfers},
		{"stream", b.measureStream},
		{"memory", b.measureMemory},
	} {
		progress("envd: %s", part.name)
		if err := part.measure(ctx); err != nil {
			return r, fmt.Errorf("measure %s: %w", part.name, err)
		}
	}
	r.Results = b.results
	return r, nil
}

func (b *envdBench) report(results ...Result) { b.results = append(b.results, results...) }

// measureStart measures from fork to the first answer, beside the start of the
// same program that does nothing.
func (b *envdBench) measureStart(ctx context.Context) error {
	var start, floor samples
	for i := range min(b.Samples, 30) + 1 {
		bare, err := timed(func() error { return exec.Command(b.binary, "-version").Run() })
		if err != nil {
			return err
		}
		agent, took, err := startEnvd(ctx, b.binary, b.dir)
		if err != nil {
			return err
		}
		if err := agent.stop(); err != nil {
			return err
		}
		if i > 0 { // the first has the program read from the disk
			start.addMillis(took)
			floor.addMillis(bare)
		}
	}
	b.report(start.result("start to first answer", "ms").beside(floor).
		noted("from fork to the answer of /health; floor: the same program, run with -version"))
	return nil
}

// measureIdle looks at an agent that has answered once.
func (b *envdBench) measureIdle() error {
	status, err := b.agent.status()
	if err != nil {
		return err
	}
	binary, err := os.Stat(b.binary)
	if err != nil {
		return err
	}
	b.report(
		single("binary", "MiB", mib(binary.Size())).want("≤ 16", binary.Size() <= 16*mebibyte),
		single("idle RSS", "MiB", mib(status.rss)).want("≤ 16", status.rss <= 16*mebibyte).noted("after the first answer"),
		single("idle threads", "threads", float64(status.threads)),
		single("idle descriptors", "descriptors", float64(status.fds)),
	)
	return nil
}

// where says which disk the files are on.
func (b *envdBench) where() string {
	var st unix.Statfs_t
	if unix.Statfs(b.Dir, &st) == nil && st.Type == unix.TMPFS_MAGIC {
		return b.Dir + ", which is in memory (tmpfs)"
	}
	return b.Dir
}

// beside sets the floor of r without a goal.
func (r Result) beside(floor samples) Result {
	r.FloorP50 = round(floor.quantile(.5))
	r.Ratio = round(r.P50 / r.FloorP50)
	return r
}

// atLeast sets the floor of r, and the lowest ratio to it that is good enough:
// for rates.
func (r Result) atLeast(floor samples, least float64) Result {
	r = r.beside(floor)
	return r.want("ratio ≥ "+strconv.FormatFloat(least, 'g', -1, 64), r.Ratio >= least)
}
