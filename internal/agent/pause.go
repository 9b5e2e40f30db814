package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// imageLimit bounds the writing of one image.
const imageLimit = 10 * time.Minute

// envLimit bounds the question for the environment before an image is written.
const envLimit = 2 * time.Second

// pause writes m to disk and frees what it holds besides. When it fails, m runs on.
//
// The image is whole before the record says so, and the record says so before the
// instance ends: a kill of the agent in between leaves either one that runs or one
// that is paused.
func (a *Agent) pause(ctx context.Context, m *managed, kind runtime.ImageKind) (size int64, err error) {
	ctx, done, err := a.transition(ctx, m, imageLimit, sandbox.Running)
	if err != nil {
		return 0, err
	}
	defer done()
	began, u := time.Now(), m.unit
	a.pullLogs(m, 50*time.Millisecond)
	env := a.environment(ctx, u)
	if err := m.setState(sandbox.Pausing); err != nil {
		return 0, fmt.Errorf("pause sandbox %s: %w", m.id, err)
	}
	// What is open would hang: nobody answers it any more.
	a.data.Evict(string(m.id))
	im, err := a.writeAndSeal(ctx, u, m.imageDir(), m.manifest(a, kind, env), true)
	if err == nil {
		m.silent()
		if err = m.setState(sandbox.Paused, func(r *record) {
			r.Instance, r.Slot, r.RuntimeState, r.ImageBytes = "", 0, nil, im.bytes()
		}); err != nil {
			m.serving(u)
		}
	}
	if err != nil {
		a.undoPause(m, u)
		return 0, fmt.Errorf("pause sandbox %s: %w", m.id, err)
	}
	m.unit = nil
	a.release(u)
	m.note("info", "sandbox paused")
	a.log.Info("sandbox paused", "sandbox", m.id, "kept", kind, "bytes", im.bytes(), "took", time.Since(began))
	return im.bytes(), nil
}

// undoPause lets m run on in u. The caller holds m.life.
func (a *Agent) undoPause(m *managed, u *unit) {
	ctx, cancel := context.WithTimeout(context.Background(), teardownLimit)
	defer cancel()
	err := errors.Join(
		m.setState(sandbox.Running, func(r *record) {
			r.Instance, r.Slot, r.RuntimeState = u.id, u.slot.Index, u.inst.State()
		}),
		removeImage(m.imageDir()),
	)
	if err != nil {
		a.log.Warn("undo failed pause", "sandbox", m.id, "err", err)
	}
	if err := u.inst.Resume(ctx); err != nil {
		select {
		case <-u.inst.Done(): // the monitor tells why
			return
		default:
		}
		a.log.Error("sandbox does not go on after a failed pause; it is asked again", "sandbox", m.id, "err", err)
		a.letGoOnLater(m, u)
	}
}

// syncTime is how long a guest may take to write its files to its disk.
const syncTime = 20 * time.Second

// takeImage takes an image of u. One of its files alone has what is on its disk, so
// the guest is asked to write that; a guest that does not answer is taken as it is,
// as after a loss of power.
func (a *Agent) takeImage(ctx context.Context, u *unit, image runtime.Image, pause bool) error {
	if image.Kind == runtime.ImageFiles {
		sctx, cancel := context.WithTimeout(ctx, syncTime)
		if err := u.guest.Sync(sctx); err != nil {
			a.log.Warn("guest does not write its files to its disk; the image has what is there", "instance", u.id, "err", err)
		}
		cancel()
	}
	return u.inst.Snapshot(ctx, image, pause)
}

// writeAndSeal writes an image of u at dir, whole or not at all.
func (a *Agent) writeAndSeal(ctx context.Context, u *unit, dir string, m manifest, pause bool) (im image, err error) {
	if err := a.admitDisk(0); err != nil {
		return im, err
	}
	tmp, err := newImage(dir)
	if err != nil {
		return im, err
	}
	if err := a.takeImage(ctx, u, runtime.Image{Dir: tmp, Kind: m.Kind}, pause); err != nil {
		return im, errors.Join(context.Cause(ctx), u.ended(err), err, os.RemoveAll(tmp))
	}
	if im, err = seal(dir, m); err != nil {
		err = errors.Join(err, removeImage(dir))
	}
	return im, err
}

// manifest describes an image of m as it is now.
func (m *managed) manifest(a *Agent, kind runtime.ImageKind, env map[string]string) manifest {
	rec, _, _ := m.status()
	return manifest{
		Kind: kind, Runtime: a.cfg.Runtime.Name(), RuntimeVersion: a.cfg.Runtime.Version(), GuestInit: rec.GuestInit,
		TemplateID: rec.TemplateID, BuildID: rec.BuildID, Resources: rec.Resources, EnvdVersion: rec.EnvdVersion,
		EnvVars: env,
	}
}

// environment is what the creator of the sandbox has set. A guest agent that does
// not answer, which the guest may see to, costs its own sandbox the environment
// after a boot and nothing else.
func (a *Agent) environment(ctx context.Context, u *unit) map[string]string {
	ctx, cancel := context.WithTimeout(ctx, envLimit)
	defer cancel()
	env, err := u.guest.EnvVars(ctx)
	if err != nil {
		a.log.Warn("read environment of sandbox", "instance", u.id, "err", err)
		return nil
	}
	for name := range env {
		if strings.HasPrefix(name, "E2B_") || strings.HasPrefix(name, "WRENN_") {
			delete(env, name) // the platform's own
		}
	}
	return env
}

// resume lets a paused sandbox go on; with boot from its files. When it fails, m
// is paused as before.
func (a *Agent) resume(ctx context.Context, m *managed, token string, boot bool) (booted bool, err error) {
	ctx, done, err := a.transition(ctx, m, createLimit, sandbox.Paused)
	if err != nil {
		return false, err
	}
	defer done()
	defer a.pool.busy()()
	began := time.Now()
	if err := a.admit(); err != nil {
		return false, err
	}
	im, _, err := a.openToResume(m.imageDir(), boot)
	if err != nil {
		return false, unusable(err)
	}
	rootfs, err := a.rootfs(m.rec.BuildID)
	if err != nil {
		return false, unusable(err)
	}
	if err := m.setState(sandbox.Resuming); err != nil {
		return false, fmt.Errorf("resume sandbox %s: %w", m.id, err)
	}
	err = a.startFromImage(ctx, m, im.dir, token, origin{rootfs: rootfs, policy: m.policy()}, guest.InitRequest{
		AccessToken: token, DefaultUser: m.rec.DefaultUser, DefaultWorkdir: m.rec.DefaultWorkdir,
		SandboxID: string(m.id), TemplateID: m.rec.TemplateID,
	}, boot)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = fmt.Errorf("%w: %s", cause, err.Error()) // whatever the runtime made of that
		}
		return false, fmt.Errorf("resume sandbox %s: %w", m.id, errors.Join(unusable(err), m.setState(sandbox.Paused)))
	}
	booted = boot || im.Kind == runtime.ImageFiles
	// It is of no use any more: what the sandbox does from now on is not in it.
	if err := removeImage(m.imageDir()); err != nil {
		a.log.Error("remove image of resumed sandbox", "sandbox", m.id, "err", err)
	}
	m.note("info", "sandbox resumed")
	a.log.Info("sandbox resumed", "sandbox", m.id, "booted", booted, "took", time.Since(began), "of_that_engine", m.unit.engineTook)
	return booted, nil
}

// transition takes hold of m, which must be in state from, for a change of state.
// The context ends when m is to be stopped. The caller calls done.
func (a *Agent) transition(ctx context.Context, m *managed, limit time.Duration, from ...sandbox.State) (_ context.Context, done func(), err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, sandbox.Errorf(sandbox.ErrUnavailable, "it took longer than %s; the host may be overloaded", limit))
	if err := a.enter(); err != nil {
		cancel()
		return nil, nil, err
	}
	m.life.Lock()
	done = func() {
		cancel()
		m.life.Unlock()
		a.wg.Done()
	}
	if err = m.begin(cancel); err == nil {
		rec, _, _ := m.status()
		err = expect(m, rec.State, from)
	}
	if err == nil && a.ctx.Err() != nil {
		err = errClosed // it ended while m was waited for, and did not see what is to be cancelled
	}
	if err == nil {
		m.disturb()
	}
	if err != nil {
		done()
		return nil, nil, err
	}
	return ctx, done, nil
}

// expect returns an error unless the state is one of those.
func expect(m *managed, now sandbox.State, want []sandbox.State) error {
	for _, s := range want {
		if now == s {
			return nil
		}
	}
	if m.torn || now == sandbox.Stopping {
		return sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s ended meanwhile", m.id)
	}
	return sandbox.Errorf(sandbox.ErrConflict, "sandbox %s is %s", m.id, now)
}
