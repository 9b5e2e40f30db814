package controlplane

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"sync"
	"time"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// CreateRequest is what a user asks for when creating a sandbox.
type CreateRequest struct {
	Template            string // id or name of a template or a snapshot
	Timeout             time.Duration
	Metadata            map[string]string
	EnvVars             map[string]string
	Secured             bool
	AllowInternetAccess bool
	Protected           bool              // ports want the traffic token; needs Secured
	MaskRequestHost     string            // see sandbox.CheckMaskRequestHost; may be empty
	Resources           sandbox.Resources // zero fields: the template's
	AutoPause           bool              // pause it at the end of its time to live
	AutoPauseMemory     bool              // and keep its memory then
	AutoResume          bool              // resume it when a request comes for it; needs AutoPause with memory
	Start               string            // how to start it from a template, see hostagent.CreateSandboxRequest; for measurements
}

// startFrom is what a sandbox is made of: a template, or the image of a snapshot.
type startFrom struct {
	template store.Template
	image    *store.Snapshot // nil: the template
	how      string
}

// Create makes a sandbox of the team and returns when its guest agent serves. A
// caller that gives up meanwhile, by cancelling ctx, leaves no sandbox behind:
// nobody knows its id.
func (c *ControlPlane) Create(ctx context.Context, teamID string, req CreateRequest) (sandbox.Sandbox, error) {
	if err := c.checkTimeout(req.Timeout); err != nil {
		return sandbox.Sandbox{}, err
	}
	if err := checkAccess(req); err != nil {
		return sandbox.Sandbox{}, err
	}
	b := sandbox.Sandbox{TeamID: teamID, Spec: sandbox.Spec{
		EnvVars: maps.Clone(req.EnvVars), Metadata: maps.Clone(req.Metadata),
		Secured: req.Secured, AllowInternetAccess: req.AllowInternetAccess, Timeout: req.Timeout,
		Protected: req.Protected, MaskRequestHost: req.MaskRequestHost,
		AutoPause: req.AutoPause, AutoPauseMemory: req.AutoPauseMemory, AutoResume: req.AutoResume,
	}}
	from, err := c.startOf(ctx, &b, req)
	if err != nil {
		return sandbox.Sandbox{}, err
	}
	if err := c.checkSandboxes(ctx, teamID, 1); err != nil {
		return sandbox.Sandbox{}, err
	}
	return c.launch(ctx, b, from)
}

// startOf finds what was asked for, and notes in b what it comes from.
func (c *ControlPlane) startOf(ctx context.Context, b *sandbox.Sandbox, req CreateRequest) (startFrom, error) {
	tpl, err := c.Template(ctx, b.TeamID, req.Template)
	if err == nil {
		b.Spec.TemplateID, b.Spec.BuildID, b.Alias = tpl.ID, tpl.BuildID, tpl.Alias
		b.Spec.Resources, err = c.resources(req.Resources, tpl)
		return startFrom{template: tpl, how: req.Start}, err
	}
	if !errors.Is(err, sandbox.ErrNotFound) {
		return startFrom{}, err
	}
	snap, serr := c.FindSnapshot(ctx, b.TeamID, req.Template)
	if errors.Is(serr, sandbox.ErrNotFound) {
		return startFrom{}, err
	}
	if serr != nil {
		return startFrom{}, serr
	}
	if asked := or(req.Resources, snap.Resources); asked != snap.Resources {
		return startFrom{}, sandbox.Errorf(sandbox.ErrInvalid, "a sandbox of a snapshot has the resources of the one that the snapshot was taken of")
	}
	b.Spec.TemplateID, b.Spec.BuildID, b.Spec.SnapshotID, b.Alias = snap.TemplateID, snap.BuildID, snap.ID, snap.Alias
	b.Spec.Resources = snap.Resources
	return startFrom{image: &snap}, nil
}

// launch makes the sandbox that b describes.
func (c *ControlPlane) launch(ctx context.Context, b sandbox.Sandbox, from startFrom) (sandbox.Sandbox, error) {
	now := time.Now()
	// There is no queue: recorded and handed to the agent is one step.
	b.ID, b.HostID, b.State = sandbox.NewID(), c.cfg.HostID, sandbox.Starting
	b.Created, b.Changed, b.Ends = now, now, now.Add(b.Spec.Timeout)
	b.Started, b.Address, b.EnvdVersion, b.Reason = time.Time{}, "", "", ""
	rpcCtx, cancel := context.WithTimeout(ctx, createLimit)
	defer cancel()
	_, finish := c.ops.beginMove(b.ID, cancel) // the id is new: nobody else is at it
	defer finish()
	// A cancelled insert may have happened or not; one that is seen through has.
	if err := c.boxes.Insert(context.WithoutCancel(ctx), b); err != nil {
		return sandbox.Sandbox{}, fmt.Errorf("record sandbox: %w", err)
	}
	err := c.start(rpcCtx, &b, from)
	if err == nil && ctx.Err() != nil {
		err = fmt.Errorf("create sandbox: %w", ctx.Err())
	}
	if err != nil {
		return sandbox.Sandbox{}, c.abandon(ctx, b, err, finish)
	}
	c.expiry.changed(b.Ends)
	return b, nil
}

// start has the agent make the sandbox and records it as running.
func (c *ControlPlane) start(ctx context.Context, b *sandbox.Sandbox, from startFrom) error {
	req := &hostagent.CreateSandboxRequest{
		SandboxId: string(b.ID), TemplateId: b.Spec.TemplateID, BuildId: b.Spec.BuildID,
		Resources: resourcesMessage(b.Spec.Resources), AllowInternetAccess: b.Spec.AllowInternetAccess,
		EnvVars: environment(from.template, b.Spec), Start: from.how,
		DefaultUser: from.template.User, DefaultWorkdir: from.template.Workdir,
	}
	if im := from.image; im != nil {
		req.ImageId, req.DefaultUser, req.DefaultWorkdir = im.ID, im.User, im.Workdir
		if im.Secured {
			req.ImageAccessToken = c.AccessToken(im.SandboxID)
		}
	}
	if b.Spec.Secured {
		req.AccessToken = c.AccessToken(b.ID)
	}
	resp, err := c.cfg.Agent.CreateSandbox(ctx, req)
	if err != nil {
		return agentError("create sandbox", err)
	}
	addr, err := netip.ParseAddr(resp.GetAddress())
	if err != nil {
		return fmt.Errorf("create sandbox: host agent gave an unusable address: %w", err)
	}
	now := time.Now()
	b.State, b.Address, b.EnvdVersion = sandbox.Running, resp.GetAddress(), resp.GetEnvdVersion()
	b.Started, b.Ends = now, now.Add(b.Spec.Timeout)
	// Reachable before it is recorded as running: a kill may come from then on,
	// and what it forgets must not be remembered after it.
	c.remember(*b, addr)
	err = c.boxes.Transition(context.WithoutCancel(ctx), b.ID, sandbox.Starting, store.Change{
		State: sandbox.Running, Address: b.Address, EnvdVersion: b.EnvdVersion, Started: b.Started, Ends: b.Ends,
		Cause: cmp.Or(startedFrom[resp.GetStartedFrom()], "started"),
	})
	if err != nil {
		c.forget(b.ID)
		return fmt.Errorf("record sandbox as running: %w", err)
	}
	return nil
}

// startedFrom says in words what a sandbox was started from.
var startedFrom = map[string]string{
	"pool":     "an instance was ready",
	"image":    "restored from its template's memory image",
	"boot":     "booted",
	"snapshot": "restored from an image",
}

func resourcesMessage(r sandbox.Resources) *hostagent.Resources {
	return &hostagent.Resources{Cpus: int32(r.CPUs), MemoryMib: r.MemoryMiB, DiskMib: r.DiskMiB, Pids: r.PIDs}
}

// KeepReady has the host keep sandboxes of a template ready, with the resources
// that a request gets which names none, whenever the agent is connected to.
func (c *ControlPlane) KeepReady(templateID string) {
	c.ready.mu.Lock()
	defer c.ready.mu.Unlock()
	c.ready.templates = append(c.ready.templates, templateID)
}

// ready are the templates of which sandboxes are kept ready.
type ready struct {
	mu        sync.Mutex
	templates []string
}

// prepareTemplates tells an agent that was just connected to.
func (c *ControlPlane) prepareTemplates(ctx context.Context) error {
	c.ready.mu.Lock()
	templates := slices.Clone(c.ready.templates)
	c.ready.mu.Unlock()
	for _, id := range templates {
		tpl, err := c.cfg.Store.Templates().Get(ctx, id)
		if err != nil {
			return fmt.Errorf("look up template: %w", err)
		}
		res, err := c.resources(sandbox.Resources{}, tpl)
		if err != nil {
			return err
		}
		_, err = c.cfg.Agent.PrepareTemplate(ctx, &hostagent.PrepareTemplateRequest{BuildId: tpl.BuildID, Resources: resourcesMessage(res)})
		if err != nil {
			return agentError("prepare template", err)
		}
	}
	return nil
}

// environment is what the template sets, and over it what the creator does.
func environment(tpl store.Template, spec sandbox.Spec) map[string]string {
	env := make(map[string]string, len(tpl.EnvVars)+len(spec.EnvVars))
	maps.Copy(env, tpl.EnvVars)
	maps.Copy(env, spec.EnvVars)
	return env
}

// createFailed begins the reason of a sandbox that never ran: it tells a reconciler
// that finds it ending how it is to end.
const createFailed = "create failed: "

// abandon tears a failed create down and returns what its caller is told. It
// calls created once the teardown is in somebody's hands: a sandbox in transition
// that nobody is working on is taken for the rest of a crash.
func (c *ControlPlane) abandon(ctx context.Context, b sandbox.Sandbox, cause error, created func()) error {
	reason, public := sandbox.Message(cause)
	if !public {
		reason = "the host could not start it"
	}
	if ctx.Err() != nil {
		reason = "its creator went away while it was being created"
	}
	finish, err := c.claimEnd(context.WithoutCancel(ctx), b.ID, outcome{state: sandbox.Failed, reason: createFailed + reason})
	created()
	if err == nil {
		err = finish()
	}
	if err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		c.log.Error("tear down sandbox of failed create", "sandbox", b.ID, "err", err)
	}
	if now, err := c.boxes.Get(context.WithoutCancel(ctx), b.ID); err == nil && now.State == sandbox.Stopped {
		return sandbox.Errorf(sandbox.ErrConflict, "sandbox %q was killed while it was being created", b.ID)
	}
	return cause
}

func (c *ControlPlane) checkTimeout(d time.Duration) error {
	if d <= 0 {
		return sandbox.Errorf(sandbox.ErrInvalid, "timeout must be greater than 0")
	}
	if d > c.cfg.Limits.MaxTimeout {
		return sandbox.Errorf(sandbox.ErrInvalid, "timeout must be at most %d seconds (%s)",
			int64(c.cfg.Limits.MaxTimeout/time.Second), c.cfg.Limits.MaxTimeout)
	}
	return nil
}

// resources are what was asked for, else the template's, else the default.
func (c *ControlPlane) resources(asked sandbox.Resources, tpl store.Template) (sandbox.Resources, error) {
	max := c.cfg.Limits.Max
	for _, r := range []struct {
		name       string
		value, max int64
	}{
		{"CPUs", int64(asked.CPUs), int64(max.CPUs)},
		{"memory in MiB", asked.MemoryMiB, max.MemoryMiB},
		{"disk in MiB", asked.DiskMiB, max.DiskMiB},
		{"tasks", asked.PIDs, max.PIDs},
	} {
		if r.value < 0 || r.value > r.max {
			return asked, sandbox.Errorf(sandbox.ErrInvalid, "%s must be between 1 and %d", r.name, r.max)
		}
	}
	asked = or(asked, sandbox.Resources{CPUs: tpl.CPUs, MemoryMiB: tpl.MemoryMiB, DiskMiB: tpl.DiskMiB})
	return or(asked, c.cfg.Limits.Resources), nil
}

const hostSilent = "the sandbox's host does not answer, try again later"

// agentError gives an error of the host agent the kind that users are told; what
// has no such kind stays internal.
func agentError(what string, err error) error {
	var e *connect.Error
	if !errors.As(err, &e) {
		return fmt.Errorf("%s: %w", what, err)
	}
	// The library has codes of its own for a broken connection, which depend on how
	// it broke.
	if !connect.IsWireError(err) && !errors.Is(err, context.Canceled) {
		return &sandbox.Error{Kind: sandbox.ErrUnavailable, Message: hostSilent, Cause: err}
	}
	switch e.Code() {
	case connect.CodeInvalidArgument:
		return &sandbox.Error{Kind: sandbox.ErrInvalid, Message: e.Message()}
	case connect.CodeNotFound:
		return &sandbox.Error{Kind: sandbox.ErrNotFound, Message: e.Message()}
	case connect.CodeAlreadyExists:
		return &sandbox.Error{Kind: sandbox.ErrConflict, Message: e.Message()}
	case connect.CodeResourceExhausted:
		// Not the caller's quota: the host is full.
		return &sandbox.Error{Kind: sandbox.ErrUnavailable, Message: "no capacity: " + e.Message()}
	case connect.CodeUnavailable, connect.CodeDeadlineExceeded:
		return &sandbox.Error{Kind: sandbox.ErrUnavailable, Message: hostSilent, Cause: err}
	}
	return fmt.Errorf("%s: %w", what, err)
}
