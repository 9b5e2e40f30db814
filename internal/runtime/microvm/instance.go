package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// state is what Instance.State records.
type state struct {
	Machine   Machine           `json:"machine"`
	Resources sandbox.Resources `json:"resources"`
}

// instance is one sandbox. It implements runtime.Instance.
type instance struct {
	rt    *Runtime
	id    sandbox.ID
	state state
	raw   json.RawMessage

	engine  *process.Handle // the monitor
	console *console
	done    chan struct{}
	exit    runtime.Exit // set before done is closed

	snapshots sync.Mutex // held while one is taken, or the machine resumed

	mu         sync.Mutex
	stopping   bool      // Stop was called
	teardown   *teardown // the clean-up under way or over; nil before the first
	compaction func()    // ends what compact began, and waits for it; nil: nothing was begun
}

// teardown is one attempt to free an instance.
type teardown struct {
	over chan struct{}
	err  error // valid once over is closed
}

// open takes hold of a running machine and watches for its end. The error is
// os.ErrProcessDone when the monitor has ended.
func (r *Runtime) open(st state) (*instance, error) {
	raw, err := json.Marshal(st)
	if err != nil {
		return nil, err
	}
	st.Machine.Cgroups = r.cgroups
	engine, err := st.Machine.PID.Open()
	if err != nil {
		return nil, err
	}
	console, err := openConsole(st.Machine)
	if err != nil {
		// The machine runs without it as well; why it ends is not known then. The
		// directory is the monitor's, which may have been taken over.
		r.cfg.Log.Warn("a machine's console cannot be read", "sandbox", st.Machine.ID, "err", err)
	}
	i := &instance{rt: r, id: st.Machine.ID, state: st, raw: raw, engine: engine, console: console, done: make(chan struct{})}
	reading := make(chan struct{})
	ctx, cancel := context.WithCancel(r.ctx)
	r.work.Go(func() {
		defer close(reading)
		console.follow(ctx)
	})
	r.work.Go(func() {
		defer cancel()
		i.watch(func() {
			cancel()
			console.interrupt()
			<-reading
		})
	})
	return i, nil
}

// watch waits for the end of the monitor, or of the runtime. stopReading ends what
// follows the console.
func (i *instance) watch(stopReading func()) {
	defer i.engine.Close()
	defer i.console.close()
	err := i.engine.Wait(i.rt.ctx)
	stopReading()
	if err != nil {
		return // the runtime is closed; the machine goes on without us
	}
	i.console.drain()
	i.exit = i.explain()
	close(i.done)
}

// explain finds out why the monitor ended, while its cgroup is there.
func (i *instance) explain() runtime.Exit {
	status, known := i.engine.ExitStatus() // reaps it, so always
	i.mu.Lock()
	stopped := i.stopping
	i.mu.Unlock()
	if why := EndReason(i.state.Machine); why != "" {
		return runtime.Exit{Reason: "the sandbox's machine was ended: " + why}
	}
	switch {
	case i.rt.cgroups.OutOfMemory(i.state.Machine.Group):
		return outOfMemory(i.state.Resources.MemoryMiB)
	case stopped:
		return runtime.Exit{Reason: "stopped"}
	case known && status.Signaled():
		return runtime.Exit{Reason: fmt.Sprintf("the sandbox's machine was killed (signal %d)%s", status.Signal(), i.console.lastLine())}
	case known && status.ExitStatus() != 0:
		return runtime.Exit{Reason: fmt.Sprintf("the sandbox's machine failed (status %d of its monitor)%s", status.ExitStatus(), i.console.lastLine())}
	default:
		return ending(i.console.text(), i.state.Resources.MemoryMiB)
	}
}

// State implements runtime.Instance.
func (i *instance) State() json.RawMessage { return i.raw }

// Done implements runtime.Instance.
func (i *instance) Done() <-chan struct{} { return i.done }

// Exit implements runtime.Instance.
func (i *instance) Exit() runtime.Exit {
	select {
	case <-i.done:
		return i.exit
	default:
		return runtime.Exit{}
	}
}

// Stop implements runtime.Instance.
func (i *instance) Stop(ctx context.Context) error {
	t := i.beginTeardown()
	select {
	case <-t.over:
		return t.err
	case <-ctx.Done():
		return fmt.Errorf("stop sandbox %s: %w", i.id, ctx.Err())
	}
}

// beginTeardown starts to free the instance, unless that is under way or done.
func (i *instance) beginTeardown() *teardown {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.stopping = true
	if t := i.teardown; t != nil {
		select {
		case <-t.over:
			if t.err == nil {
				return t
			}
		default:
			return t
		}
	}
	t := &teardown{over: make(chan struct{})}
	i.teardown = t
	i.rt.work.Go(func() {
		defer close(t.over)
		ctx, cancel := context.WithTimeout(context.Background(), teardownTime)
		defer cancel()
		if t.err = i.free(ctx); t.err != nil {
			t.err = fmt.Errorf("stop sandbox %s: %w", i.id, t.err)
		}
	})
	return t
}

func (i *instance) free(ctx context.Context) error {
	// The monitor first, so that Exit is known before the cgroup goes.
	engine, err := i.state.Machine.PID.Open()
	if err == nil {
		err = engine.Kill()
		engine.Close()
	}
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-i.done:
	case <-i.rt.ctx.Done(): // no watcher any more
	case <-ctx.Done():
		return ctx.Err()
	}
	i.endCompaction()
	return i.rt.free(ctx, i.id, i.state.Machine.Dir)
}

// Stats implements runtime.Instance.
func (i *instance) Stats(context.Context) (runtime.Stats, error) {
	cg, name := i.rt.cgroups, i.state.Machine.Group
	cpu, err := cg.CPUTime(name)
	if err != nil {
		return runtime.Stats{}, i.statsError(err)
	}
	memory, err := cg.Memory(name)
	if err != nil {
		return runtime.Stats{}, i.statsError(err)
	}
	pids, err := cg.PIDs(name)
	if err != nil {
		return runtime.Stats{}, i.statsError(err)
	}
	return runtime.Stats{Time: time.Now(), CPU: cpu, MemoryBytes: memory, PIDs: pids}, nil
}

func (i *instance) gone() error {
	return sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s is not running any more", i.id)
}

// endNotice is how long after a monitor has closed its connections its end may be
// noticed.
const endNotice = time.Second

// orGone puts the end of the monitor in the place of what came of it.
func (i *instance) orGone(err error) error {
	if err == nil {
		return nil
	}
	notice := time.NewTimer(0)
	if errors.Is(err, io.EOF) || errors.Is(err, unix.ECONNRESET) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EPIPE) {
		notice.Reset(endNotice)
	}
	defer notice.Stop()
	select {
	case <-i.done:
		return errors.Join(i.gone(), err)
	case <-notice.C:
		return err
	}
}

func (i *instance) statsError(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return i.gone()
	}
	return fmt.Errorf("measure sandbox %s: %w", i.id, err)
}
