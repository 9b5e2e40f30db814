package microvm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// state is what Instance.State records.
type state struct {
	Machine   Machine           `json:"machine"`
	Resources sandbox.Resources `json:"resources"`
}

// instance is one sandbox. It implements runtime.Instance.
type instance struct {
	*life.Instance // its engine is the monitor
	rt             *Runtime
	state          state
	console        *console

	snapshots sync.Mutex // held while one is taken, or the machine resumed

	mu         sync.Mutex
	compaction func() // ends what compact began, and waits for it; nil: nothing was begun
}

// open takes hold of a running machine and watches for its end. The error is
// os.ErrProcessDone when the monitor has ended.
func (r *Runtime) open(st state) (*instance, error) {
	st.Machine.Cgroups = r.set.Cgroups
	i := &instance{rt: r, state: st}
	var err error
	if i.Instance, err = r.set.Hold(st.Machine.ID, st.Machine.PID, st, i.free); err != nil {
		return nil, err
	}
	console, err := openConsole(st.Machine)
	if err != nil {
		// The machine runs without it as well; why it ends is not known then. The
		// directory is the monitor's, which may have been taken over.
		r.cfg.Log.Warn("a machine's console cannot be read", "sandbox", st.Machine.ID, "err", err)
	}
	i.console = console
	reading := make(chan struct{})
	ctx, cancel := context.WithCancel(r.set.Context())
	r.set.Go(func() {
		defer close(reading)
		console.follow(ctx)
	})
	r.set.Go(func() {
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
	defer i.Engine.Close()
	defer i.console.close()
	err := i.Engine.Wait(i.rt.set.Context())
	stopReading()
	if err != nil {
		return // the runtime is closed; the machine goes on without us
	}
	i.console.drain()
	i.End(i.explain())
}

// explain finds out why the monitor ended, while its cgroup is there.
func (i *instance) explain() runtime.Exit {
	status, known := i.Engine.ExitStatus() // reaps it, so always
	stopped := i.Stopping()
	if why := EndReason(i.state.Machine); why != "" {
		return runtime.Exit{Reason: "the sandbox's machine was ended: " + why}
	}
	switch {
	case i.rt.set.Cgroups.OutOfMemory(i.state.Machine.Group):
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

// free frees all that there is of the machine.
func (i *instance) free(ctx context.Context) error {
	i.endCompaction()
	return i.rt.free(ctx, i.ID, i.state.Machine.Dir)
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
	case <-i.Done():
		return errors.Join(life.Gone(i.ID), err)
	case <-notice.C:
		return err
	}
}
