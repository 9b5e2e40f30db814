package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// createLimit bounds the making of one sandbox, also on a host under load.
const createLimit = 60 * time.Second

// What a host keeps for itself: below either a new sandbox is refused, because
// it would end others.
const (
	reservedMemory = 512 << 20 // bytes
	reservedDisk   = 1 << 30   // bytes
)

// What a sandbox was started from, for logs and metrics.
const (
	fromPool     = "pool"     // an instance of the template that was ready
	fromImage    = "image"    // the template's memory image
	fromBoot     = "boot"     // the template, booted
	fromSnapshot = "snapshot" // an image that the caller named
)

type createRequest struct {
	id             sandbox.ID
	templateID     string
	buildID        string
	resources      sandbox.Resources
	policy         network.Policy
	accessToken    string
	envVars        map[string]string
	defaultUser    string
	defaultWorkdir string
	imageID        sandbox.ID // empty: start from the template
	imageToken     string     // that the guest agent in the image has
	start          string     // "", fromImage or fromBoot; see the RPC
}

// create makes a sandbox and returns it once its guest agent serves, with what it
// was started from. On failure nothing is left.
func (a *Agent) create(ctx context.Context, req createRequest) (_ *managed, from string, err error) {
	began := time.Now()
	rootfs, err := a.rootfs(req.buildID)
	if err != nil {
		return nil, "", err
	}
	if err := a.admit(); err != nil {
		return nil, "", err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, createLimit,
		sandbox.Errorf(sandbox.ErrUnavailable, "the sandbox did not come up in %s; the host may be overloaded", createLimit))
	defer cancel()

	m := newManaged(record{
		ID: req.id, State: sandbox.Starting,
		TemplateID: req.templateID, BuildID: req.buildID, Resources: req.resources,
		DefaultUser: req.defaultUser, DefaultWorkdir: req.defaultWorkdir, AllowInternet: req.policy.AllowInternet,
		GuestInit: filepath.Base(a.cfg.GuestInit), Runtime: a.cfg.Runtime.Name(), Created: began,
	}, a.sandboxDir(req.id))
	m.cancel = cancel
	m.life.Lock()
	defer m.life.Unlock()
	if err := a.add(m); err != nil {
		return nil, "", err
	}
	defer a.wg.Done()
	defer a.pool.busy()()
	from, err = a.build(ctx, m, req, rootfs)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		if terr := a.teardown(m, sandbox.Failed, "it could not be started", false); terr != nil {
			a.log.Error("undo failed create", "sandbox", m.id, "err", terr)
		}
		return nil, "", fmt.Errorf("create sandbox %s: %w", req.id, err)
	}
	a.pool.started(from)
	a.log.Info("sandbox started", "sandbox", m.id, "build", req.buildID, "from", from, "took", time.Since(began), "of_that_engine", m.unit.engineTook)
	return m, from, nil
}

// rootfs is the root filesystem of a template build.
func (a *Agent) rootfs(buildID string) (string, error) {
	// Runtimes refuse to mount through links, which the operator may have made.
	path, err := filepath.EvalSymlinks(filepath.Join(a.cfg.Templates, buildID, "rootfs"))
	if fi, serr := os.Stat(path); err != nil || serr != nil || !fi.IsDir() {
		return "", sandbox.Errorf(sandbox.ErrNotFound, "template build %q is not on this host", buildID)
	}
	return path, nil
}

// build makes what m is, in order, and journals it. The caller holds m.life and
// tears m down when it fails.
func (a *Agent) build(ctx context.Context, m *managed, req createRequest, rootfs string) (from string, err error) {
	if err := os.Mkdir(m.dir, 0o700); err != nil {
		return "", fmt.Errorf("make sandbox directory: %w", err)
	}
	if err := m.setState(sandbox.Starting); err != nil {
		return "", err
	}
	init := guest.InitRequest{
		AccessToken: req.accessToken, EnvVars: req.envVars, Timestamp: time.Now(),
		DefaultUser: req.defaultUser, DefaultWorkdir: req.defaultWorkdir,
		SandboxID: string(req.id), TemplateID: req.templateID,
	}
	o := origin{
		rootfs: rootfs, guestInit: a.cfg.GuestInit, resources: req.resources, policy: req.policy,
	}
	if req.imageID != "" {
		return fromSnapshot, a.startFromImage(ctx, m, a.imageDir(req.imageID), req.imageToken, o, init, false)
	}
	key := shelfKey{build: req.buildID, resources: req.resources}
	if req.start == "" && req.policy.AllowInternet {
		if u := a.pool.take(key); u != nil {
			if err = a.run(ctx, m, u, init); err == nil || ctx.Err() != nil {
				return fromPool, err
			}
			a.log.Warn("a ready instance could not be used", "instance", u.id, "err", err)
		}
	}
	if req.start != fromBoot {
		if im, ok := a.pool.image(key); ok {
			o.image = im.runtime()
			if err = a.runNew(ctx, m, o, init); err == nil || ctx.Err() != nil {
				return fromImage, err
			}
			a.log.Warn("a template's memory image could not be used", "build", req.buildID, "err", err)
			if errors.Is(err, sandbox.ErrInvalid) {
				a.pool.discardImage(key)
			}
			o.image = runtime.Image{}
		}
	}
	return fromBoot, a.runNew(ctx, m, o, init)
}

// startFromImage starts m from an image, or with boot from the files that are in
// it. The caller holds m.life.
func (a *Agent) startFromImage(ctx context.Context, m *managed, dir, token string, o origin, init guest.InitRequest, boot bool) error {
	im, damage, err := a.openToResume(dir, boot)
	if err != nil {
		return err
	}
	o.resources, o.guestInit = im.Resources, filepath.Join(filepath.Dir(a.cfg.GuestInit), im.GuestInit)
	o.image, o.token = im.runtime(), token
	loads := cmp.Or(damage, im.loads(a.cfg.Runtime, o.guestInit))
	switch {
	case im.Kind == runtime.ImageFiles && damage != nil:
		return damage
	case im.Kind == runtime.ImageFiles:
		o.guestInit, o.token = a.cfg.GuestInit, "" // it boots: what is in the image knows no guest agent
		init.EnvVars = over(im.EnvVars, init.EnvVars)
	case boot:
		init.EnvVars = over(im.EnvVars, init.EnvVars)
		return a.bootFromMemory(ctx, m, o, init, loads)
	case loads != nil:
		return loads
	case len(init.EnvVars) > 0:
		init.EnvVars = over(im.EnvVars, init.EnvVars)
	default:
		init.EnvVars = nil // the guest agent has them
	}
	return a.runFrom(ctx, m, o, init)
}

// openToResume is openImage. For a boot what is wrong with an image of this runtime's is
// given apart: its files may be whole.
func (a *Agent) openToResume(dir string, boot bool) (im image, damage, err error) {
	im, err = openImage(dir, a.cfg.Runtime)
	if boot && errors.Is(err, sandbox.ErrInvalid) && im.Runtime == a.cfg.Runtime.Name() {
		return im, err, nil
	}
	return im, nil, err
}

// bootFromMemory starts m from the files of an image with memory; loads is nil if that
// memory can be loaded. Where it cannot, the runtime may have the files without it.
func (a *Agent) bootFromMemory(ctx context.Context, m *managed, o origin, init guest.InitRequest, loads error) error {
	err := loads
	if err == nil {
		var files origin
		if files, err = a.filesOf(ctx, m, o); err == nil {
			defer os.RemoveAll(files.image.Dir)
			return a.runFrom(ctx, m, files, init)
		}
	}
	if ctx.Err() != nil || errors.Is(err, sandbox.ErrExhausted) || errors.Is(err, sandbox.ErrUnavailable) {
		return err // it may load the next time
	}
	a.log.Warn("a sandbox starts from its disk as it was; what it had not written there is lost", "sandbox", m.id, "err", err)
	o.image.Kind, o.token, o.guestInit = runtime.ImageFiles, "", a.cfg.GuestInit
	if direct := a.runFrom(ctx, m, o, init); !errors.Is(direct, sandbox.ErrInvalid) {
		return direct
	}
	return err // of a runtime that has no disk without the memory
}

// runFrom is runNew for an origin that has resources and a guest agent of its own.
func (a *Agent) runFrom(ctx context.Context, m *managed, o origin, init guest.InitRequest) error {
	m.mu.Lock()
	m.rec.Resources, m.rec.GuestInit = o.resources, filepath.Base(o.guestInit)
	m.mu.Unlock()
	return a.runNew(ctx, m, o, init)
}

// filesOf makes of the origin of an image with memory one of its files alone.
func (a *Agent) filesOf(ctx context.Context, m *managed, o origin) (origin, error) {
	u, err := a.startUnit(ctx, o)
	if err != nil {
		return o, err
	}
	defer a.release(u)
	files := runtime.Image{Dir: filepath.Join(m.dir, "files"), Kind: runtime.ImageFiles}
	if err := errors.Join(os.RemoveAll(files.Dir), os.Mkdir(files.Dir, 0o700)); err != nil {
		return o, fmt.Errorf("make image directory: %w", err)
	}
	if err := a.takeImage(ctx, u, files, true); err != nil {
		return o, errors.Join(err, os.RemoveAll(files.Dir))
	}
	o.image, o.token, o.guestInit = files, "", a.cfg.GuestInit
	return o, nil
}

// runNew starts an instance and lets m run in it.
func (a *Agent) runNew(ctx context.Context, m *managed, o origin, init guest.InitRequest) error {
	u, err := a.startUnit(ctx, o)
	if err != nil {
		return err
	}
	return a.run(ctx, m, u, init)
}

// run lets m run in u, which it takes over: on failure u is freed. The caller
// holds m.life.
func (a *Agent) run(ctx context.Context, m *managed, u *unit, init guest.InitRequest) (err error) {
	defer func() {
		if err != nil {
			m.unit = nil
			m.silent()
			a.release(u)
		}
	}()
	init.Timestamp = time.Now()
	identified := make(chan struct{})
	go func() {
		defer close(identified)
		a.identify(ctx, u, init)
	}()
	version, err := u.announce(ctx, init)
	<-identified
	if err != nil {
		return err
	}
	m.unit = u
	m.serving(u)
	err = m.setState(sandbox.Running, func(r *record) {
		r.EnvdVersion, r.Instance, r.Slot, r.RuntimeState, r.ImageBytes = version, u.id, u.slot.Index, u.inst.State(), 0
	})
	if err != nil {
		return err
	}
	a.wg.Go(func() { a.monitor(m, u) })
	return nil
}

// identify leaves for the guest to ask what announce tells its agent. That nobody
// answers it then is no reason not to use a sandbox whose agent knows.
func (a *Agent) identify(ctx context.Context, u *unit, init guest.InitRequest) {
	ctx, cancel := context.WithTimeout(ctx, identifyLimit)
	defer cancel()
	if err := u.inst.Identify(ctx, init.SandboxID, init.TemplateID); err != nil {
		a.log.Warn("the sandbox cannot be asked who it is", "instance", u.id, "err", err)
	}
}

// identifyLimit is how long a monitor may take to note an identity: normally less than
// a millisecond.
const identifyLimit = 2 * time.Second

// over is the union of two environments, in which the second wins.
func over(env, wins map[string]string) map[string]string {
	all := make(map[string]string, len(env)+len(wins))
	maps.Copy(all, env)
	maps.Copy(all, wins)
	return all
}

// admit refuses a new sandbox when the host has nothing left to give.
func (a *Agent) admit() error {
	if free, err := availableMemory(); err == nil && free < reservedMemory {
		return sandbox.Errorf(sandbox.ErrExhausted, "the host is out of memory (%d MiB left); kill or pause sandboxes that are not needed", free>>20)
	}
	return a.admitDisk(0)
}

// admitDisk refuses what would fill the disk, on which size bytes are to be written.
func (a *Agent) admitDisk(size int64) error {
	// The directory may be a file system of its own, in a file that has no more room
	// than where it lies.
	for _, dir := range []string{a.cfg.Dir, filepath.Dir(a.cfg.Dir)} {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err != nil {
			return fmt.Errorf("measure free disk: %w", err)
		}
		if free := int64(fs.Bavail) * fs.Bsize; free-size < reservedDisk {
			return &sandbox.Error{
				Kind:    sandbox.ErrExhausted,
				Message: fmt.Sprintf("the host's disk is full (%d MiB left); delete snapshots, or kill sandboxes that are not needed", free>>20),
				Cause:   fmt.Errorf("measured at %s", dir),
			}
		}
	}
	return nil
}
