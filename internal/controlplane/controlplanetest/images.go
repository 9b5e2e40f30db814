package controlplanetest

import (
	"context"
	"errors"
	"slices"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// imageBytes is the size of every image here.
const imageBytes = 1 << 20

// move takes a sandbox from one state to another, around a hook.
func (a *Agent) move(ctx context.Context, id string, from, to sandbox.State, hook func(context.Context, string) error) error {
	a.mu.Lock()
	err := a.up()
	s := a.boxes[id]
	switch {
	case err != nil:
	case s == nil:
		err = connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	case s.State != string(from):
		err = connect.NewError(connect.CodeAlreadyExists, errors.New("sandbox is "+s.State))
	}
	a.mu.Unlock()
	if err == nil && hook != nil {
		err = hook(ctx, id)
	}
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if s = a.boxes[id]; s == nil {
		return connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	a.boxes[id] = &hostagent.SandboxStatus{SandboxId: id, State: string(to), Address: s.Address, ChangedAt: timestamppb.Now()}
	if to == sandbox.Paused {
		a.boxes[id].ImageBytes = imageBytes
	}
	return nil
}

// PauseSandbox implements the RPC.
func (a *Agent) PauseSandbox(ctx context.Context, req *hostagent.PauseSandboxRequest) (*hostagent.PauseSandboxResponse, error) {
	if err := a.move(ctx, req.SandboxId, sandbox.Running, sandbox.Paused, a.OnPause); err != nil {
		return nil, err
	}
	return &hostagent.PauseSandboxResponse{ImageBytes: imageBytes}, nil
}

// ResumeSandbox implements the RPC.
func (a *Agent) ResumeSandbox(ctx context.Context, req *hostagent.ResumeSandboxRequest) (*hostagent.ResumeSandboxResponse, error) {
	if err := a.move(ctx, req.SandboxId, sandbox.Paused, sandbox.Running, a.OnResume); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.resumed[req.SandboxId]++
	return &hostagent.ResumeSandboxResponse{Address: a.boxes[req.SandboxId].GetAddress(), EnvdVersion: "0.6.99", Booted: req.Boot}, nil
}

// Resumes returns how many times the sandbox was resumed.
func (a *Agent) Resumes(id sandbox.ID) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.resumed[string(id)]
}

// SnapshotSandbox implements the RPC.
func (a *Agent) SnapshotSandbox(ctx context.Context, req *hostagent.SnapshotSandboxRequest) (*hostagent.SnapshotSandboxResponse, error) {
	a.mu.Lock()
	hook, err := a.OnSnapshot, a.up()
	if err == nil && a.boxes[req.SandboxId] == nil {
		err = connect.NewError(connect.CodeNotFound, errors.New("no such sandbox"))
	}
	a.mu.Unlock()
	if err == nil && hook != nil {
		err = hook(ctx, req.SandboxId)
	}
	if err != nil {
		return nil, err
	}
	a.PutImage(req.ImageId, time.Now())
	return &hostagent.SnapshotSandboxResponse{ImageBytes: imageBytes, Kind: "memory"}, nil
}

// PutImage adds an image as if it had been made at that time.
func (a *Agent) PutImage(id string, created time.Time) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.images[id] = created
}

// Images returns the ids of the images that it has, sorted.
func (a *Agent) Images() (ids []string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for id := range a.images {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return ids
}

// DeleteImage implements the RPC.
func (a *Agent) DeleteImage(_ context.Context, req *hostagent.DeleteImageRequest) (*hostagent.DeleteImageResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.images, req.ImageId)
	return &hostagent.DeleteImageResponse{}, a.up()
}

// ListImages implements the RPC.
func (a *Agent) ListImages(context.Context, *hostagent.ListImagesRequest) (*hostagent.ListImagesResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	resp := &hostagent.ListImagesResponse{}
	for id, created := range a.images {
		resp.Images = append(resp.Images, &hostagent.Image{ImageId: id, Bytes: imageBytes, CreatedAt: timestamppb.New(created)})
	}
	return resp, a.up()
}

// PrepareTemplate implements the RPC.
func (a *Agent) PrepareTemplate(context.Context, *hostagent.PrepareTemplateRequest) (*hostagent.PrepareTemplateResponse, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return &hostagent.PrepareTemplateResponse{}, a.up()
}
