package life

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Instance is a running instance as far as those of all runtimes are the same. Their
// own types embed it, watch for the end of Engine, and call End then.
type Instance struct {
	ID     sandbox.ID
	Engine *process.Handle // with its process the instance ends

	set   *Set
	state json.RawMessage
	free  func(context.Context) error
	done  chan struct{}
	exit  runtime.Exit // set before done is closed

	mu       sync.Mutex
	stopping bool      // Stop was called
	teardown *teardown // the clean-up under way or over; nil before the first
}

// teardown is one attempt to free an instance.
type teardown struct {
	over chan struct{}
	err  error // valid once over is closed
}

// Hold takes hold of a running instance. state is what State returns, and free frees
// all that there is of the instance, once its engine has ended. The error is
// os.ErrProcessDone when that has already.
func (s *Set) Hold(id sandbox.ID, engine process.ID, state any, free func(context.Context) error) (*Instance, error) {
	raw, err := json.Marshal(state)
	if err != nil {
		return nil, err
	}
	h, err := engine.Open()
	if err != nil {
		return nil, err
	}
	return &Instance{ID: id, Engine: h, set: s, state: raw, free: free, done: make(chan struct{})}, nil
}

// End tells that the instance has ended, and how. It is called once.
func (i *Instance) End(exit runtime.Exit) {
	i.exit = exit
	close(i.done)
}

// Stopping says whether the instance was told to stop.
func (i *Instance) Stopping() bool {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.stopping
}

// State implements runtime.Instance.
func (i *Instance) State() json.RawMessage { return i.state }

// Done implements runtime.Instance.
func (i *Instance) Done() <-chan struct{} { return i.done }

// Exit implements runtime.Instance.
func (i *Instance) Exit() runtime.Exit {
	select {
	case <-i.done:
		return i.exit
	default:
		return runtime.Exit{}
	}
}

// Stop implements runtime.Instance.
func (i *Instance) Stop(ctx context.Context) error {
	t := i.beginTeardown()
	select {
	case <-t.over:
		return t.err
	case <-ctx.Done():
		return fmt.Errorf("stop sandbox %s: %w", i.ID, ctx.Err())
	}
}

// beginTeardown starts to free the instance, unless that is under way or done.
func (i *Instance) beginTeardown() *teardown {
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
	i.set.Go(func() {
		defer close(t.over)
		ctx, cancel := context.WithTimeout(context.Background(), FreeTime)
		defer cancel()
		if t.err = i.endAndFree(ctx); t.err != nil {
			t.err = fmt.Errorf("stop sandbox %s: %w", i.ID, t.err)
		}
	})
	return t
}

func (i *Instance) endAndFree(ctx context.Context) error {
	// The engine first and alone: with it everything in the guest ends, and Exit is
	// known before the cgroup goes. The watcher may have closed its handle.
	engine, err := i.Engine.Open()
	if err == nil {
		err = engine.Kill()
		engine.Close()
	}
	if err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-i.done:
	case <-i.set.ctx.Done(): // no watcher any more
	case <-ctx.Done():
		return ctx.Err()
	}
	return i.free(ctx)
}

// Stats implements runtime.Instance.
func (i *Instance) Stats(context.Context) (runtime.Stats, error) {
	cg, name := i.set.Cgroups, i.set.Group(i.ID)
	cpu, err := cg.CPUTime(name)
	if err != nil {
		return runtime.Stats{}, i.MeasureError(err)
	}
	memory, err := cg.Memory(name)
	if err != nil {
		return runtime.Stats{}, i.MeasureError(err)
	}
	pids, err := cg.PIDs(name)
	if err != nil {
		return runtime.Stats{}, i.MeasureError(err)
	}
	return runtime.Stats{Time: time.Now(), CPU: cpu, MemoryBytes: memory, PIDs: pids}, nil
}

// MeasureError is the error of a look at the control group, which goes with the
// instance.
func (i *Instance) MeasureError(err error) error {
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENODEV) {
		return Gone(i.ID)
	}
	return fmt.Errorf("measure sandbox %s: %w", i.ID, err)
}

// Gone is the error of an instance that does not run any more.
func Gone(id sandbox.ID) *sandbox.Error {
	return sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s is not running any more", id)
}

// ReadState reads into state what State has returned of the instance.
func ReadState(id sandbox.ID, raw json.RawMessage, state any) error {
	if err := json.Unmarshal(raw, state); err != nil {
		return &sandbox.Error{Kind: sandbox.ErrInvalid, Message: fmt.Sprintf("the recorded state of sandbox %s is damaged", id), Cause: err}
	}
	return nil
}
