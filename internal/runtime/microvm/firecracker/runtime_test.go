package firecracker_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"testing"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/sandbox"
)

const (
	startedID = "firecrackerstarted00"
	cloneID   = "firecrackerclone0000"
)

// What of a runtime needs no guest: a machine outlives the agent that started it, is
// taken over, paused, restored, killed and cleaned up.
func TestLifeWithoutGuest(t *testing.T) { eachJail(t, testLifeWithoutGuest) }

func TestRealLife(t *testing.T) { eachRealJail(t, testLifeWithoutGuest) }

func testLifeWithoutGuest(t *testing.T, s *site) {
	disks, root, vmlinux := t.TempDir(), t.TempDir(), readable(t)
	if s.real != "" {
		vmlinux = guestKernel(t)
	}
	open := func() *microvm.Runtime {
		rt, err := microvm.New(microvm.Config{
			Monitor: s.monitor(t, "1.15.1", firecracker.Config{}), Disks: disks, Tag: tag, Log: slog.New(slog.DiscardHandler),
			Kernel: kernel.Kernel{Name: "test", Version: "1", Vmlinux: vmlinux, Initramfs: readable(t)},
		})
		if err != nil {
			t.Fatal(err)
		}
		return rt
	}
	config := func(id sandbox.ID) runtime.Config {
		return runtime.Config{
			ID: id, RootFS: root, Dir: t.TempDir(), GuestInit: s.binary, Slot: s.slot(t), Hostname: "box",
			Resources: sandbox.Resources{CPUs: 1, MemoryMiB: 64, DiskMiB: 64, PIDs: 100},
		}
	}
	first := open()
	started, err := first.Create(t.Context(), config(startedID))
	if err != nil {
		t.Fatal(err)
	}
	state := started.State()
	if err := first.Close(); err != nil { // the agent has ended
		t.Fatal(err)
	}

	rt := open()
	defer func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	}()
	inst, err := rt.Adopt(t.Context(), startedID, state)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := inst.Stats(t.Context()); err != nil || st.PIDs == 0 {
		t.Errorf("stats are %+v (%v)", st, err)
	}
	image := runtime.Image{Kind: runtime.ImageMemory, Dir: t.TempDir()}
	if err := inst.Snapshot(t.Context(), image, true); err != nil {
		t.Fatal(err)
	}
	clone, err := rt.Restore(t.Context(), config(cloneID), image)
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	kill(t, clone)
	<-clone.Done()
	if err := clone.Snapshot(t.Context(), runtime.Image{Kind: runtime.ImageMemory, Dir: t.TempDir()}, true); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("snapshot of one that was killed: %v", err)
	}
	for _, i := range []runtime.Instance{clone, inst} {
		if err := i.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, err := rt.Adopt(t.Context(), startedID, state); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("one that has ended is taken over: %v", err)
	}
	for _, left := range append(leftovers(t, startedID), leftovers(t, cloneID)...) {
		t.Error("left:", left)
	}
}

func readable(t *testing.T) string {
	t.Helper()
	path := file(t)
	if err := os.Chmod(path, 0o444); err != nil {
		t.Fatal(err)
	}
	return path
}

func (s *site) slot(t *testing.T) *network.Slot {
	t.Helper()
	slot, err := s.pool.Acquire(t.Context(), network.Policy{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.pool.Release(context.Background(), slot) })
	if err := slot.Prepare(); err != nil {
		t.Fatal(err)
	}
	return slot
}
