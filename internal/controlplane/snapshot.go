package controlplane

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// Snapshot keeps an image of the team's sandbox, from which others can be created.
// The sandbox goes on, or stays paused. name may be empty; the newest of a name is
// the one that is meant by it.
func (c *ControlPlane) Snapshot(ctx context.Context, teamID string, id sandbox.ID, name string) (store.Snapshot, error) {
	name, err := c.ownName(ctx, teamID, name)
	if err != nil {
		return store.Snapshot{}, err
	}
	if err := c.checkDisk(ctx, teamID); err != nil {
		return store.Snapshot{}, err
	}
	b, err := c.steady(ctx, teamID, id)
	if err != nil {
		return store.Snapshot{}, err
	}
	s, err := c.snapshotOf(ctx, b, name)
	if err != nil {
		return s, err
	}
	defer c.ops.useImage(s.ID)()
	ctx = context.WithoutCancel(ctx) // the record and the image are there both or not at all
	if err := c.cfg.Store.Snapshots().Insert(ctx, s); err != nil {
		return s, fmt.Errorf("record snapshot: %w", err)
	}
	if s.SizeBytes, err = c.writeImage(ctx, b.ID, s.ID); err == nil {
		err = c.cfg.Store.Snapshots().SetState(ctx, s.ID, store.SnapshotCreating, store.SnapshotReady, s.SizeBytes)
	}
	if err != nil {
		if derr := c.dropSnapshot(ctx, s.ID); derr != nil {
			c.log.Error("remove what a failed snapshot left", "snapshot", s.ID, "err", derr)
		}
		return s, err
	}
	s.State = store.SnapshotReady
	c.log.Info("sandbox snapshotted", "sandbox", id, "snapshot", s.ID, "bytes", s.SizeBytes)
	return s, nil
}

// steady returns the team's sandbox when it runs or is paused, and waits while it
// is on the way from one to the other.
func (c *ControlPlane) steady(ctx context.Context, teamID string, id sandbox.ID) (sandbox.Sandbox, error) {
	for {
		b, err := c.owned(ctx, teamID, id)
		switch {
		case err != nil:
			return b, err
		case b.State.Final() || b.State == sandbox.Stopping:
			return b, errGone(b)
		case b.State == sandbox.Running || b.State == sandbox.Paused:
			return b, nil
		}
		if err := c.awaitMove(ctx, b); err != nil {
			return b, err
		}
	}
}

// snapshotOf is the record of a snapshot of b that is about to be made.
func (c *ControlPlane) snapshotOf(ctx context.Context, b sandbox.Sandbox, name string) (store.Snapshot, error) {
	tpl, err := c.cfg.Store.Templates().Get(ctx, b.Spec.TemplateID)
	if err != nil {
		return store.Snapshot{}, fmt.Errorf("look up template of sandbox: %w", err)
	}
	s := store.Snapshot{
		ID: string(sandbox.NewID()), TeamID: b.TeamID, HostID: b.HostID, Name: name, SandboxID: b.ID,
		TemplateID: b.Spec.TemplateID, BuildID: b.Spec.BuildID, Alias: b.Alias, Resources: b.Spec.Resources,
		Secured: b.Spec.Secured, AllowInternet: b.Spec.AllowInternetAccess, Kind: store.SnapshotMemory,
		User: tpl.User, Workdir: tpl.Workdir, EnvdVersion: b.EnvdVersion, State: store.SnapshotCreating, Created: time.Now(),
	}
	if b.State == sandbox.Paused && !b.MemoryKept {
		s.Kind = store.SnapshotFiles
	}
	return s, nil
}

// writeImage has the agent write an image of a sandbox.
func (c *ControlPlane) writeImage(ctx context.Context, id sandbox.ID, image string) (size int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, pauseLimit)
	defer cancel()
	resp, err := c.cfg.Agent.SnapshotSandbox(ctx, &hostagent.SnapshotSandboxRequest{SandboxId: string(id), ImageId: image})
	if err != nil {
		return 0, agentError("snapshot sandbox", err)
	}
	return resp.GetImageBytes(), nil
}

// Snapshots returns the team's snapshots that the filter picks, newest first.
func (c *ControlPlane) Snapshots(ctx context.Context, teamID string, f store.SnapshotFilter) ([]store.Snapshot, error) {
	f.TeamID, f.States = teamID, []store.SnapshotState{store.SnapshotReady}
	return c.cfg.Store.Snapshots().List(ctx, f)
}

// FindSnapshot returns the team's snapshot of that id or name.
func (c *ControlPlane) FindSnapshot(ctx context.Context, teamID, ref string) (store.Snapshot, error) {
	notFound := sandbox.Errorf(sandbox.ErrNotFound, "snapshot %q not found", clip(ref))
	slug, name, err := sandbox.ParseName(ref)
	if err != nil {
		return store.Snapshot{}, notFound
	}
	if slug != "" {
		team, err := c.cfg.Store.Teams().Get(ctx, teamID)
		if err != nil || team.Slug != slug {
			return store.Snapshot{}, errors.Join(ignoreLost(err), notFound)
		}
	}
	s, err := c.cfg.Store.Snapshots().Get(ctx, name)
	if errors.Is(err, sandbox.ErrNotFound) {
		s, err = c.cfg.Store.Snapshots().GetByName(ctx, teamID, name)
	}
	switch {
	case errors.Is(err, sandbox.ErrNotFound), err == nil && (s.TeamID != teamID || s.State != store.SnapshotReady):
		return store.Snapshot{}, notFound
	case err != nil:
		return store.Snapshot{}, fmt.Errorf("look up snapshot: %w", err)
	}
	return s, nil
}

// DeleteSnapshot deletes the team's snapshot of that id or name. Sandboxes that
// were created from it are not touched.
func (c *ControlPlane) DeleteSnapshot(ctx context.Context, teamID, ref string) error {
	s, err := c.FindSnapshot(ctx, teamID, ref)
	if err != nil {
		return err
	}
	ctx = context.WithoutCancel(ctx)
	err = c.cfg.Store.Snapshots().SetState(ctx, s.ID, store.SnapshotReady, store.SnapshotDeleting, 0)
	if errors.Is(err, sandbox.ErrConflict) {
		return sandbox.Errorf(sandbox.ErrNotFound, "snapshot %q not found", clip(ref))
	}
	if err != nil {
		return fmt.Errorf("record snapshot as being deleted: %w", err)
	}
	if err := c.dropSnapshot(ctx, s.ID); err != nil {
		// To everybody it is gone; the reconciler goes on from here.
		c.log.Warn("delete snapshot", "snapshot", s.ID, "err", err)
	}
	return nil
}

// dropSnapshot deletes image and record, in this order.
func (c *ControlPlane) dropSnapshot(ctx context.Context, id string) error {
	if err := c.deleteImage(ctx, id); err != nil {
		return err
	}
	if err := c.cfg.Store.Snapshots().Delete(ctx, id); err != nil && !errors.Is(err, sandbox.ErrNotFound) {
		return fmt.Errorf("delete record of snapshot: %w", err)
	}
	return nil
}

func (c *ControlPlane) deleteImage(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
	defer cancel()
	if _, err := c.cfg.Agent.DeleteImage(ctx, &hostagent.DeleteImageRequest{ImageId: id}); err != nil {
		return agentError("delete image", err)
	}
	return nil
}

// ownName checks the name for a snapshot of the team's.
func (c *ControlPlane) ownName(ctx context.Context, teamID, ref string) (string, error) {
	if ref == "" {
		return "", nil
	}
	slug, name, err := sandbox.ParseName(ref)
	if err != nil {
		return "", err
	}
	if slug != "" {
		team, err := c.cfg.Store.Teams().Get(ctx, teamID)
		if err != nil {
			return "", fmt.Errorf("look up team: %w", err)
		}
		if team.Slug != slug {
			return "", sandbox.Errorf(sandbox.ErrForbidden, "name %q: your team is called %q", clip(ref), team.Slug)
		}
	}
	if _, err := c.Template(ctx, teamID, name); !errors.Is(err, sandbox.ErrNotFound) {
		if err != nil && !errors.Is(err, sandbox.ErrForbidden) {
			return "", err
		}
		return "", sandbox.Errorf(sandbox.ErrInvalid, "name %q is that of a template; choose another", clip(ref))
	}
	return name, nil
}

// imageGrace is how old an image has to be before it can be garbage: a control
// plane writes an image's record before it asks for the image.
const imageGrace = 15 * time.Second

// collectImages finishes what a crash has left of snapshots: those half-made or
// half-deleted, and images that no record names.
func (c *ControlPlane) collectImages(ctx context.Context) error {
	resp, err := c.cfg.Agent.ListImages(ctx, &hostagent.ListImagesRequest{})
	if err != nil {
		return agentError("list images of host", err)
	}
	records, err := c.cfg.Store.Snapshots().List(ctx, store.SnapshotFilter{HostID: c.cfg.HostID})
	if err != nil {
		return fmt.Errorf("list snapshots: %w", err)
	}
	known := make(map[string]bool, len(records))
	var errs []error
	for _, s := range records {
		known[s.ID] = true
		if s.State == store.SnapshotReady || c.ops.usesImage(s.ID) || time.Since(s.Created) < imageGrace {
			continue
		}
		c.log.Info("removing a snapshot that is not whole", "snapshot", s.ID, "state", s.State)
		errs = append(errs, c.dropSnapshot(ctx, s.ID))
	}
	for _, im := range resp.GetImages() {
		if id := im.GetImageId(); !known[id] && !c.ops.usesImage(id) && time.Since(im.GetCreatedAt().AsTime()) > imageGrace {
			c.log.Info("removing an image that no snapshot refers to", "image", id)
			errs = append(errs, c.deleteImage(ctx, id))
		}
	}
	return errors.Join(errs...)
}
