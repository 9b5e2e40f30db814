package gvisor

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
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
	*life.Instance
	rt    *Runtime
	state state

	oom   *os.File    // readable when the guest is out of memory; nil where the kernel needs no help
	oomed atomic.Bool // it was

	snapshots sync.Mutex // held while one is taken, or the guest resumed
}

// open takes hold of a running instance and watches for its end. The error is
// os.ErrProcessDone when the engine has ended.
func (r *Runtime) open(id sandbox.ID, st state) (*instance, error) {
	i := &instance{rt: r, state: st}
	var err error
	if i.Instance, err = r.set.Hold(id, st.Engine, st, i.free); err != nil {
		return nil, err
	}
	if i.oom, err = r.set.Cgroups.OOMEvents(r.set.Group(id)); err != nil {
		i.Engine.Close()
		return nil, err
	}
	r.set.Go(i.watch)
	if i.oom != nil {
		r.set.Go(i.watchMemory)
	}
	return i, nil
}

// watch waits for the end of the engine, or of the runtime.
func (i *instance) watch() {
	defer i.Engine.Close()
	if i.oom != nil {
		defer i.oom.Close()
	}
	if err := i.Engine.Wait(i.rt.set.Context()); err != nil {
		return // the runtime is closed; the instance goes on without us
	}
	exit := i.explain()
	// The gofer ends with the engine; as a child of ours it would stay a zombie.
	if gofer, err := i.state.Gofer.Open(); err == nil {
		ctx, cancel := context.WithTimeout(i.rt.set.Context(), time.Second)
		if gofer.Wait(ctx) == nil { // the clean-up waits again
			gofer.Reap()
		}
		cancel()
		gofer.Close()
	}
	i.End(exit)
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
		if !i.rt.set.Cgroups.Exists(i.rt.set.Group(i.ID)) {
			return
		}
		i.oomed.Store(true)
		_ = i.Engine.Kill() // it may have been the kernel's choice
	}
}

// explain finds out why the engine ended, while its cgroup and files are there.
func (i *instance) explain() runtime.Exit {
	status, known := i.Engine.ExitStatus() // reaps it, so always
	stopped := i.Stopping()
	cg, name := i.rt.set.Cgroups, i.rt.set.Group(i.ID)
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

// free frees all that there is of the instance.
func (i *instance) free(ctx context.Context) error {
	return free(ctx, i.rt.set, i.rt.cfg.Root, i.ID, i.state.Dir)
}
