package agent

import (
	"context"
	"errors"
	"fmt"
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
}

// create makes a sandbox and returns it once its guest agent serves. On failure
// nothing is left.
func (a *Agent) create(ctx context.Context, req createRequest) (_ *managed, err error) {
	// Runtimes refuse to mount through links, which the operator may have made.
	rootfs, err := filepath.EvalSymlinks(filepath.Join(a.cfg.Templates, req.buildID, "rootfs"))
	if fi, serr := os.Stat(rootfs); err != nil || serr != nil || !fi.IsDir() {
		return nil, sandbox.Errorf(sandbox.ErrNotFound, "template build %q is not on this host", req.buildID)
	}
	if err := a.admit(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, createLimit,
		sandbox.Errorf(sandbox.ErrUnavailable, "the sandbox did not come up in %s; the host may be overloaded", createLimit))
	defer cancel()

	m := newManaged(record{
		ID: req.id, State: sandbox.Starting,
		TemplateID: req.templateID, BuildID: req.buildID, Resources: req.resources,
		Runtime: a.cfg.Runtime.Name(), Created: time.Now(),
	}, a.sandboxDir(req.id))
	m.cancel = cancel
	m.life.Lock()
	if err := a.add(m); err != nil {
		m.life.Unlock()
		return nil, err
	}
	defer a.wg.Done()
	err = a.build(ctx, m, req, rootfs)
	m.life.Unlock()
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = errors.Join(cause, err)
		}
		if terr := a.teardown(m, sandbox.Failed, "it could not be started", false); terr != nil {
			a.log.Error("undo failed create", "sandbox", m.id, "err", terr)
		}
		return nil, fmt.Errorf("create sandbox %s: %w", req.id, err)
	}
	a.log.Info("sandbox started", "sandbox", m.id, "build", req.buildID, "took", time.Since(m.rec.Created), "of_that_engine", m.engineTook)
	return m, nil
}

// build makes the parts of m in order. What it has made is in m, for teardown.
func (a *Agent) build(ctx context.Context, m *managed, req createRequest, rootfs string) (err error) {
	m.slot, err = a.slots.Acquire(ctx, req.policy)
	if errors.Is(err, network.ErrNoFreeSlot) {
		return sandbox.Errorf(sandbox.ErrExhausted, "every network address is taken; kill sandboxes that are not needed, or start the platform with a larger --network-cidr")
	}
	if err != nil {
		return fmt.Errorf("acquire network slot: %w", err)
	}
	m.mu.Lock()
	m.rec.Slot = m.slot.Index
	m.mu.Unlock()
	if err := os.Mkdir(m.dir, 0o700); err != nil {
		return fmt.Errorf("make sandbox directory: %w", err)
	}
	if err := m.setState(sandbox.Starting); err != nil {
		return err
	}
	if err := m.slot.Prepare(); err != nil {
		return fmt.Errorf("prepare network slot: %w", err)
	}
	begin := time.Now()
	m.inst, err = a.cfg.Runtime.Create(ctx, runtime.Config{
		ID: m.id, RootFS: rootfs, Dir: m.dir,
		GuestInit: a.cfg.GuestInit,
		Slot:      m.slot, Hostname: string(m.id), Resources: req.resources,
	})
	if err != nil {
		return fmt.Errorf("start runtime: %w", err)
	}
	m.engineTook = time.Since(begin)
	client := guest.NewClient(m.slot.HostAddr, req.accessToken)
	m.serving(m.slot.HostAddr, client)
	version, err := a.announce(ctx, m.inst, client, req)
	if err != nil {
		return err
	}
	m.mu.Lock()
	m.rec.EnvdVersion = version
	m.rec.RuntimeState = m.inst.State()
	m.mu.Unlock()
	if err := m.setState(sandbox.Running); err != nil {
		return err
	}
	a.wg.Go(func() { a.monitor(m, m.inst) })
	return nil
}

// announce tells the guest agent who it is, as soon as it answers, and gives up
// when the instance ends instead.
func (a *Agent) announce(ctx context.Context, inst runtime.Instance, c *guest.Client, req createRequest) (string, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	watched := make(chan struct{})
	defer func() { cancel(nil); <-watched }()
	go func() {
		defer close(watched)
		select {
		case <-inst.Done():
			cancel(sandbox.Errorf(sandbox.ErrUnavailable, "the sandbox ended while it was starting: %s", inst.Exit().Reason))
		case <-ctx.Done():
		}
	}()
	version, err := c.Init(ctx, guest.InitRequest{
		AccessToken: req.accessToken, EnvVars: req.envVars, Timestamp: time.Now(),
		DefaultUser: req.defaultUser, DefaultWorkdir: req.defaultWorkdir,
		SandboxID: string(req.id), TemplateID: req.templateID,
	})
	if err != nil {
		return "", errors.Join(context.Cause(ctx), err)
	}
	return version, nil
}

// admit refuses a new sandbox when the host has nothing left to give.
func (a *Agent) admit() error {
	if free, err := availableMemory(); err == nil && free < reservedMemory {
		return sandbox.Errorf(sandbox.ErrExhausted, "the host is out of memory (%d MiB left); kill sandboxes that are not needed", free>>20)
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(a.cfg.Dir, &fs); err != nil {
		return fmt.Errorf("measure free disk: %w", err)
	}
	if free := int64(fs.Bavail) * fs.Bsize; free < reservedDisk {
		return sandbox.Errorf(sandbox.ErrExhausted, "the host's disk is full (%d MiB left under %s)", free>>20, a.cfg.Dir)
	}
	return nil
}
