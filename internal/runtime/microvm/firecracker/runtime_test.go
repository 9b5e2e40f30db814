package firecracker_test

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/memory/pager"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/runtime/microvm/microvmtest"
	"github.com/wrenn/wrenn/internal/runtime/runtimetest"
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
	disks := t.TempDir()
	open := func() *microvm.Runtime { return s.runtime(t, disks, firecracker.Config{}) }
	first := open()
	started, err := first.Create(t.Context(), s.config(t, startedID))
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
	clone, err := rt.Restore(t.Context(), s.config(t, cloneID), image)
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, i := range []runtime.Instance{inst, clone} {
		if err := i.Identify(t.Context(), "sandbox", "base"); err != nil {
			t.Error(err)
		}
	}
	microvmtest.Kill(t, clone)
	<-clone.Done()
	if err := clone.Snapshot(t.Context(), runtime.Image{Kind: runtime.ImageMemory, Dir: t.TempDir()}, true); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("snapshot of one that was killed: %v", err)
	}
	if err := clone.Identify(t.Context(), "sandbox", "base"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("identify one that was killed: %v", err)
	}
	for _, i := range []runtime.Instance{clone, inst} {
		if err := i.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if _, err := rt.Adopt(t.Context(), startedID, state); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("one that has ended is taken over: %v", err)
	}
	for _, left := range append(runtimetest.Leftovers(t, startedID), runtimetest.Leftovers(t, cloneID)...) {
		t.Error("left:", left)
	}
}

func (s *site) runtime(t *testing.T, disks string, cfg firecracker.Config) *microvm.Runtime {
	t.Helper()
	vmlinux := readable(t)
	if s.real != "" {
		vmlinux = guestKernel(t)
	}
	rt, err := microvm.New(microvm.Config{
		Monitor: s.monitor(t, "1.15.1", cfg), Disks: disks, Tag: tag, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
		Kernel: kernel.Kernel{Name: "test", Version: "1", Vmlinux: vmlinux, Initramfs: readable(t)},
	})
	if err != nil {
		t.Fatal(err)
	}
	return rt
}

func (s *site) config(t *testing.T, id sandbox.ID) runtime.Config {
	t.Helper()
	return runtime.Config{
		ID: id, RootFS: t.TempDir(), Dir: t.TempDir(), GuestInit: s.binary, Slot: s.slot(t), Hostname: "box",
		Resources: sandbox.Resources{CPUs: 1, MemoryMiB: 64, DiskMiB: 64, PIDs: 100},
	}
}

// TestWorkingSetStays pauses a machine whose image went with its resume: what it touched
// then is brought in at the next.
func TestWorkingSetStays(t *testing.T) { eachJail(t, testWorkingSetStays) }

func testWorkingSetStays(t *testing.T, s *site) {
	needFaultsServed(t)
	client, socket := startPager(t)
	rt := s.runtime(t, t.TempDir(), throughPager(socket))
	defer rt.Close()
	inst, err := rt.Create(t.Context(), s.config(t, startedID))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		goOn(t, inst)
	}
	for n, id := range []sandbox.ID{cloneID, "firecrackeragain0000", "firecrackerlast00000"} {
		image := runtime.Image{Kind: runtime.ImageMemory, Dir: t.TempDir()}
		if err := errors.Join(inst.Snapshot(t.Context(), image, true), inst.Stop(t.Context())); err != nil {
			t.Fatal(err)
		}
		blocks, err := pager.ReadWorkingSet(filepath.Join(image.Dir, microvm.WorkingSet))
		if n > 0 && (err != nil || len(blocks) == 0) {
			t.Errorf("image %d has a working set of %d blocks (%v)", n, len(blocks), err)
		}
		if inst, err = rt.Restore(t.Context(), s.config(t, id), image); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(image.Dir); err != nil { // as the agent does
			t.Fatal(err)
		}
		goOn(t, inst)
		// The guest does not wait for what is brought in beside it.
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		st, err := client.Status(ctx, string(id))
		for n > 0 && err == nil && st.Prefetched == 0 {
			st, err = client.Status(ctx, string(id))
		}
		cancel()
		if err != nil || st.Budget == 0 || n > 0 && st.Prefetched == 0 {
			t.Errorf("machine %d: %+v (%v)", n, st, err)
		}
	}
	if err := inst.Stop(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestDamagedUnderGuest damages a layer of a machine that runs. When the guest comes
// to the damaged page the machine ends, and its end says why, to the agent that is
// there and to one that was not.
func TestDamagedUnderGuest(t *testing.T) { eachJail(t, testDamagedUnderGuest) }

func testDamagedUnderGuest(t *testing.T, s *site) {
	needFaultsServed(t)
	client, socket := startPager(t)
	disks := t.TempDir()
	rt := s.runtime(t, disks, throughPager(socket))
	defer rt.Close()
	started, err := rt.Create(t.Context(), s.config(t, startedID))
	if err != nil {
		t.Fatal(err)
	}
	for range 3 { // counts to 4
		goOn(t, started)
	}
	image := runtime.Image{Kind: runtime.ImageMemory, Dir: t.TempDir()}
	if err := started.Snapshot(t.Context(), image, true); err != nil {
		t.Fatal(err)
	}
	cfg := s.config(t, cloneID)
	clone, err := rt.Restore(t.Context(), cfg, image) // counts to 5, and looks back at 2
	if err != nil {
		t.Fatal(err)
	}
	if err := started.Stop(t.Context()); err != nil {
		t.Error(err)
	}
	damageAll(t, image.Dir)
	// Counts to 6, and looks back at 3.
	if err := goOn(t, clone); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("a machine goes on without its memory: %v", err)
	}
	<-clone.Done()
	if why := clone.Exit().Reason; !strings.Contains(why, "memory image is damaged: block ") {
		t.Errorf("the end is explained by %q", why)
	}
	later := s.runtime(t, disks, throughPager(socket))
	defer later.Close()
	if _, err := later.Adopt(t.Context(), cloneID, clone.State()); !errors.Is(err, sandbox.ErrNotFound) || !strings.Contains(err.Error(), "damaged: block ") {
		t.Errorf("a later agent is told: %v", err)
	}
	if _, err := client.Status(t.Context(), cloneID); err != nil {
		t.Errorf("the pager forgets it before it is freed: %v", err)
	}
	if err := later.Discard(t.Context(), cloneID, clone.State()); err != nil {
		t.Error(err)
	}
	if st, err := client.Status(t.Context(), cloneID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("the pager remembers it: %+v (%v)", st, err)
	}
	if left, err := os.ReadDir(cfg.Dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v (%v)", left, err)
	}
}

// TestDamagedBeforeLoad restores from an image that fails at once.
func TestDamagedBeforeLoad(t *testing.T) { eachJail(t, testDamagedBeforeLoad) }

func TestRealDamagedBeforeLoad(t *testing.T) { eachRealJail(t, testDamagedBeforeLoad) }

func testDamagedBeforeLoad(t *testing.T, s *site) {
	needFaultsServed(t)
	client, socket := startPager(t)
	rt := s.runtime(t, t.TempDir(), throughPager(socket))
	defer rt.Close()
	image := s.image(t, rt)
	damageAll(t, image.Dir)
	if _, err := rt.Restore(t.Context(), s.config(t, cloneID), image); err == nil || !strings.Contains(err.Error(), "damaged: block ") {
		t.Errorf("a machine of damaged memory: %v", err)
	}
	if all, err := client.List(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("the pager has %+v (%v)", all, err)
	}
}

// image starts a machine, which ends with an image of its memory.
func (s *site) image(t *testing.T, rt *microvm.Runtime) runtime.Image {
	t.Helper()
	started, err := rt.Create(t.Context(), s.config(t, startedID))
	if err != nil {
		t.Fatal(err)
	}
	image := runtime.Image{Kind: runtime.ImageMemory, Dir: t.TempDir()}
	if err := errors.Join(started.Snapshot(t.Context(), image, true), started.Stop(t.Context())); err != nil {
		t.Fatal(err)
	}
	return image
}

// goOn pauses a machine and lets its guest go on.
func goOn(t *testing.T, inst runtime.Instance) error {
	t.Helper()
	if err := inst.Snapshot(t.Context(), runtime.Image{Kind: runtime.ImageFiles, Dir: t.TempDir()}, true); err != nil {
		t.Fatal(err)
	}
	return inst.Resume(t.Context())
}

// damageAll changes every block of an image's layers.
func damageAll(t *testing.T, dir string) {
	t.Helper()
	layers, err := filepath.Glob(filepath.Join(dir, "memory-*.layer"))
	if err != nil || len(layers) == 0 {
		t.Fatal(layers, err)
	}
	for _, path := range layers {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		info, err := f.Stat()
		if err != nil {
			t.Fatal(err)
		}
		for at := int64(17); at < info.Size()/4096*4096; at += 4096 {
			if _, err := f.WriteAt([]byte{0xee}, at); err != nil {
				t.Fatal(err)
			}
		}
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
