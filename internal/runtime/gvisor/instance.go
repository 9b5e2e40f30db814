package gvisor

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// state is what Instance.State records.
type state struct {
	Dir       string     `json:"dir"`
	MemoryMiB int64      `json:"memoryMiB"`
	DiskMiB   int64      `json:"diskMiB"`
	PIDs      int64      `json:"pids"`
	Version   string     `json:"version"` // of the engine
	Init      int64      `json:"init"`    // size of the guest agent
	Engine    process.ID `json:"engine"`
	Gofer     process.ID `json:"gofer"`
}

// instance is one sandbox. It implements runtime.Instance.
type instance struct {
	rt    *Runtime
	id    sandbox.ID
	state state
	raw   json.RawMessage

	engine *process.Handle
	oom    *os.File    // readable when the guest is out of memory; nil where the kernel needs no help
	oomed  atomic.Bool // it was
	done   chan struct{}
	exit   runtime.Exit // set before done is closed

	snapshots sync.Mutex // held while one is taken, or the guest resumed

	mu       sync.Mutex
	stopping bool      // Stop was called
	teardown *teardown // the clean-up under way or over; nil before the first
}

// teardown is one attempt to free an instance.
type teardown struct {
	over chan struct{}
	err  error // valid once over is closed
}

// open takes hold of a running instance and watches for its end. The error is
// os.ErrProcessDone when the engine has ended.
func (r *Runtime) open(id sandbox.ID, st state) (*instance, error) {
	raw, err := json.Marshal(st)
	if err != nil {
		return nil, err
	}
	engine, err := st.Engine.Open()
	if err != nil {
		return nil, err
	}
	i := &instance{rt: r, id: id, state: st, raw: raw, engine: engine, done: make(chan struct{})}
	if i.oom, err = r.cgroups.OOMEvents(group(r.cfg.Tag, id)); err != nil {
		engine.Close()
		return nil, err
	}
	r.work.Go(i.watch)
	if i.oom != nil {
		r.work.Go(i.watchMemory)
	}
	return i, nil
}

// watch waits for the end of the engine, or of the runtime.
func (i *instance) watch() {
	defer i.engine.Close()
	if i.oom != nil {
		defer i.oom.Close()
	}
	if err := i.engine.Wait(i.rt.ctx); err != nil {
		return // the runtime is closed; the instance goes on without us
	}
	i.exit = i.explain()
	// The gofer ends with the engine; as a child of ours it would stay a zombie.
	if gofer, err := i.state.Gofer.Open(); err == nil {
		ctx, cancel := context.WithTimeout(i.rt.ctx, time.Second)
		if gofer.Wait(ctx) == nil { // the clean-up waits again
			gofer.Reap()
		}
		cancel()
		gofer.Close()
	}
	close(i.done)
}

// watchMemory ends the engine when the guest has used up its memory. The kernel
// ends one process of its choice then; when that is one of the guest's, the
// sandbox would go on with a part missing that nobody was told of.
func (i *instance) watchMemory() {
	var count [8]byte
	for {
		if _, err := i.oom.Read(count[:]); err != nil {
			return // closed: the engine has ended, or the runtime is closed
		}
		// The removal of the cgroup is an event too.
		if !i.rt.cgroups.Exists(group(i.rt.cfg.Tag, i.id)) {
			return
		}
		i.oomed.Store(true)
		_ = i.engine.Kill() // it may have been the kernel's choice
	}
}

// explain finds out why the engine ended, while its cgroup and files are there.
func (i *instance) explain() runtime.Exit {
	status, known := i.engine.ExitStatus() // reaps it, so always
	cg, name := i.rt.cgroups, group(i.rt.cfg.Tag, i.id)
	i.mu.Lock()
	stopped := i.stopping
	i.mu.Unlock()
	switch {
	case i.oomed.Load() || cg.OutOfMemory(name):
		return runtime.Exit{
			OutOfMemory: true,
			Reason:      fmt.Sprintf("out of memory: the sandbox exceeded its limit of %d MiB", i.state.MemoryMiB),
		}
	case stopped:
		return runtime.Exit{Reason: "stopped"}
	case cg.OutOfPIDs(name) && crash(filepath.Join(i.state.Dir, panicFile)) != "":
		// The sandbox kernel needs tasks of the same limit, and cannot go on without.
		return runtime.Exit{Reason: fmt.Sprintf("too many processes: the sandbox exceeded its limit of %d tasks", i.state.PIDs)}
	default:
		return runtime.Exit{Reason: ending(i.state.Dir, status, known)}
	}
}

// ending says in words how the engine ended.
func ending(dir string, status unix.WaitStatus, known bool) string {
	if line := crash(filepath.Join(dir, panicFile)); line != "" {
		return "sandbox engine crashed: " + line
	}
	switch {
	case !known:
		if reason := fatalError(filepath.Join(dir, logFile)); reason != "" {
			return "sandbox engine failed: " + reason
		}
		return "sandbox engine ended"
	case status.Signaled():
		return fmt.Sprintf("sandbox engine was killed (signal %d)", status.Signal())
	case status.ExitStatus() > 128: // the guest's init, killed by a signal of the guest's
		return fmt.Sprintf("guest agent was killed (signal %d)", status.ExitStatus()-128)
	default:
		return fmt.Sprintf("guest agent exited with status %d", status.ExitStatus())
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
		t.err = i.free(ctx)
	})
	return t
}

func (i *instance) free(ctx context.Context) error {
	// The engine first and alone: with it the kernel ends everything in the
	// guest, and Exit is known before the cgroup goes.
	engine, err := i.state.Engine.Open()
	if err == nil {
		err = engine.Kill()
		engine.Close()
	}
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stop sandbox %s: %w", i.id, err)
	}
	select {
	case <-i.done:
	case <-i.rt.ctx.Done(): // no watcher any more
	case <-ctx.Done():
		return fmt.Errorf("stop sandbox %s: %w", i.id, ctx.Err())
	}
	if err := free(ctx, i.rt.cgroups, i.rt.cfg.Root, i.rt.cfg.Tag, i.id, i.state.Dir); err != nil {
		return fmt.Errorf("stop sandbox %s: %w", i.id, err)
	}
	return nil
}

// Stats implements runtime.Instance.
func (i *instance) Stats(context.Context) (runtime.Stats, error) {
	cg, name := i.rt.cgroups, group(i.rt.cfg.Tag, i.id)
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

func (i *instance) statsError(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return i.gone()
	}
	return fmt.Errorf("measure sandbox %s: %w", i.id, err)
}
