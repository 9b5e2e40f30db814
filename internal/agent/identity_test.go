package agent_test

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// known is a runtime that notes whose its instances are said to be. It fails all the
// same: the sandboxes are none the worse for it.
type known struct {
	runtime.Runtime
	mu     sync.Mutex
	owners map[sandbox.ID][]string // by instance
}

func (k *known) Create(ctx context.Context, cfg runtime.Config) (runtime.Instance, error) {
	i, err := k.Runtime.Create(ctx, cfg)
	return k.wrap(cfg.ID, i), err
}

func (k *known) Restore(ctx context.Context, cfg runtime.Config, image runtime.Image) (runtime.Instance, error) {
	i, err := k.Runtime.Restore(ctx, cfg, image)
	return k.wrap(cfg.ID, i), err
}

func (k *known) wrap(id sandbox.ID, i runtime.Instance) runtime.Instance {
	if i == nil {
		return nil
	}
	return knownInstance{i, k, id}
}

type knownInstance struct {
	runtime.Instance
	all *known
	id  sandbox.ID
}

func (i knownInstance) Identify(_ context.Context, sandboxID, templateID string) error {
	i.all.mu.Lock()
	defer i.all.mu.Unlock()
	i.all.owners[i.id] = append(i.all.owners[i.id], sandboxID+" of "+templateID)
	return errors.New("nobody can be told")
}

// take gives what was said since the last time, of one instance each.
func (k *known) take(t *testing.T) (said []string) {
	t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	for id, owners := range k.owners {
		if len(owners) != 1 {
			t.Errorf("instance %s is said to be %q", id, owners)
		}
		said = append(said, owners...)
	}
	k.owners = map[sandbox.ID][]string{}
	return said
}

func TestEachInstanceIsToldWhoseItIsWhenSomebodyGetsIt(t *testing.T) {
	h := newHost(t)
	k := &known{Runtime: h.runtime, owners: map[sandbox.ID][]string{}}
	h.runtime = k
	a, c := h.open(t)
	of := func(req *hostagent.CreateSandboxRequest) { req.TemplateId = "base" }
	id, _ := sandboxOf(t, c, of)
	if said := k.take(t); !slices.Equal(said, []string{id + " of base"}) {
		t.Errorf("created: %q", said)
	}
	pauseSandbox(t, c, id, false)
	resumeSandbox(t, c, id, false)
	if said := k.take(t); !slices.Equal(said, []string{id + " of base"}) {
		t.Errorf("resumed: %q", said)
	}
	image := string(sandbox.NewID())
	if _, err := c.SnapshotSandbox(t.Context(), &hostagent.SnapshotSandboxRequest{SandboxId: id, ImageId: image}); err != nil {
		t.Fatal(err)
	}
	child, _ := sandboxOf(t, c, of, func(req *hostagent.CreateSandboxRequest) { req.ImageId, req.ImageAccessToken = image, "secret" })
	if said := k.take(t); !slices.Equal(said, []string{child + " of base"}) {
		t.Errorf("forked: %q", said)
	}
	if _, err := c.DeleteImage(t.Context(), &hostagent.DeleteImageRequest{ImageId: image}); err != nil {
		t.Error(err)
	}
	if err := a.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	h.clean(t)
}
