package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// unit is one instance and all that it holds on the host: what a sandbox has
// while it runs, and gives back when it is paused. It has an id and a directory
// of its own, so that nothing of a unit that is being freed is in the way of the
// next one of the same sandbox. A directory that no record names is what a killed
// agent left, and is freed at the next start.
type unit struct {
	id    sandbox.ID
	dir   string
	slot  *network.Slot    // nil once released
	inst  runtime.Instance // nil before it is made
	guest *guest.Client    // nil before the instance is made

	engineTook time.Duration // to start the instance; for the log
}

// origin is what a unit is started from.
type origin struct {
	rootfs    string
	guestInit string
	resources sandbox.Resources
	policy    network.Policy
	image     runtime.Image // Dir is empty where the template is booted
	token     string        // that the guest agent has from before; empty: none
	spare     bool          // for the pool: nobody waits for it
}

// neutralName is the hostname until the guest agent is told which sandbox it is in.
const neutralName = "sandbox"

// startUnit starts an instance and returns once its guest's init runs. On failure
// nothing is left, or is being freed in the background.
func (a *Agent) startUnit(ctx context.Context, o origin) (_ *unit, err error) {
	u := &unit{id: sandbox.NewID()}
	u.dir = a.instanceDir(u.id)
	defer func() {
		if err == nil {
			return
		}
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		if ferr := a.freeUnit(u); ferr != nil {
			a.log.Error("undo failed start", "instance", u.id, "err", ferr)
			a.release(u)
		}
	}()
	if err := os.Mkdir(u.dir, 0o700); err != nil {
		return nil, fmt.Errorf("make instance directory: %w", err)
	}
	u.slot, err = a.slots.Acquire(ctx, o.policy)
	for errors.Is(err, network.ErrNoFreeSlot) && !o.spare && (a.pool.giveBack(ctx) || a.awaitRelease(ctx)) {
		u.slot, err = a.slots.Acquire(ctx, o.policy)
	}
	if errors.Is(err, network.ErrNoFreeSlot) {
		return nil, sandbox.Errorf(sandbox.ErrExhausted, "every network address is taken; kill sandboxes that are not needed, or start the platform with a larger --network-cidr")
	}
	if err != nil {
		return nil, fmt.Errorf("acquire network slot: %w", err)
	}
	if err := u.slot.Prepare(); err != nil {
		return nil, fmt.Errorf("prepare network slot: %w", err)
	}
	cfg := runtime.Config{
		ID: u.id, RootFS: o.rootfs, Dir: u.dir, GuestInit: o.guestInit,
		Slot: u.slot, Hostname: neutralName, Resources: o.resources,
	}
	begin := time.Now()
	var inst runtime.Instance
	if o.image.Dir == "" {
		inst, err = a.cfg.Runtime.Create(ctx, cfg)
	} else {
		inst, err = a.cfg.Runtime.Restore(ctx, cfg, o.image)
	}
	if err != nil {
		return nil, fmt.Errorf("start runtime: %w", err)
	}
	u.inst = inst
	u.engineTook = time.Since(begin)
	u.guest = guest.NewClient(u.slot.HostAddr, o.token)
	return u, nil
}

// announce tells the guest agent who it is, as soon as it answers, and gives up
// when the instance ends instead.
func (u *unit) announce(ctx context.Context, req guest.InitRequest) (version string, err error) {
	err = u.whileAlive(ctx, func(ctx context.Context) (err error) {
		version, err = u.guest.Init(ctx, req)
		return err
	})
	if err == nil {
		u.guest.SetToken(req.AccessToken)
	}
	return version, err
}

// whileAlive calls f with a context that ends with the instance.
func (u *unit) whileAlive(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	watched := make(chan struct{})
	defer func() { cancel(nil); <-watched }()
	go func() {
		defer close(watched)
		select {
		case <-u.inst.Done():
			cancel(sandbox.Errorf(sandbox.ErrUnavailable, "the sandbox ended while it was starting: %s", u.inst.Exit().Reason))
		case <-ctx.Done():
		}
	}()
	if err := f(ctx); err != nil {
		return errors.Join(context.Cause(ctx), err)
	}
	return nil
}

// endNotice is how long after an error of an instance its end may be noticed.
const endNotice = time.Second

// ended tells in words that err came of the instance's end; nil if it did not.
func (u *unit) ended(err error) error {
	notice := time.NewTimer(0)
	if errors.Is(err, sandbox.ErrNotFound) {
		notice.Reset(endNotice)
	}
	defer notice.Stop()
	select {
	case <-u.inst.Done():
		return sandbox.Errorf(sandbox.ErrNotFound, "the sandbox ended meanwhile: %s", u.inst.Exit().Reason)
	case <-notice.C:
		return nil
	}
}

// freeUnit ends the instance and gives back what it holds. It is idempotent: when
// a part fails the rest is freed all the same, and the next call tries again.
func (a *Agent) freeUnit(u *unit) error {
	ctx, cancel := context.WithTimeout(context.Background(), teardownLimit)
	defer cancel()
	if u.guest != nil {
		u.guest.Close()
	}
	var errs []error
	if u.inst != nil {
		errs = append(errs, u.inst.Stop(ctx))
	} else {
		errs = append(errs, a.cfg.Runtime.Discard(ctx, u.id, nil))
	}
	if u.slot != nil {
		if err := a.slots.Release(ctx, u.slot); err != nil {
			errs = append(errs, fmt.Errorf("release slot %d: %w", u.slot.Index, err))
		} else {
			u.slot = nil
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("free instance %s: %w", u.id, err)
	}
	if err := disk.RemoveAll(u.dir); err != nil {
		return fmt.Errorf("free instance %s: %w", u.id, err)
	}
	return nil
}

// release frees a unit that nobody needs any more in the background. The caller
// has registered nothing: it may be called while the agent is ending.
func (a *Agent) release(u *unit) {
	a.releases.begin()
	a.freeing.Go(func() {
		defer a.releases.end()
		for {
			err := a.freeUnit(u)
			if err == nil {
				return
			}
			a.log.Error("free instance", "instance", u.id, "err", err, "retry_in", teardownRetry)
			select {
			case <-a.ctx.Done():
				return // the next agent finds its directory
			case <-time.After(teardownRetry):
			}
		}
	})
}

// releases knows of the units that are being freed in the background.
type releases struct {
	mu    sync.Mutex
	count int
	ended chan struct{} // closed when the next of them is freed
}

func (r *releases) begin() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended == nil {
		r.ended = make(chan struct{})
	}
	r.count++
}

func (r *releases) end() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count--
	close(r.ended)
	r.ended = make(chan struct{})
}

// awaitRelease waits until a unit has been freed, and reports false where none is
// being freed.
func (a *Agent) awaitRelease(ctx context.Context) bool {
	a.releases.mu.Lock()
	n, ended := a.releases.count, a.releases.ended
	a.releases.mu.Unlock()
	if n == 0 {
		return false
	}
	select {
	case <-ended:
		return true
	case <-ctx.Done():
		return false
	}
}

func (a *Agent) instancesDir() string { return filepath.Join(a.cfg.Dir, "instances") }

func (a *Agent) instanceDir(id sandbox.ID) string { return filepath.Join(a.instancesDir(), string(id)) }
