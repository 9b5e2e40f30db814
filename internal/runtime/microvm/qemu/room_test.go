package qemu_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/microvm/microvmtest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// A full disk is found out where an image is written, and by nobody else.
func TestASnapshotNeedsNoRoomInTheMachinesDirectory(t *testing.T) {
	h := harness(t)
	dir, rootfs := t.TempDir(), t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if err := os.MkdirAll(filepath.Join(rootfs, filepath.Dir(runtime.GuestInitPath)), 0o755); err != nil {
		t.Fatal(err)
	}
	inst, err := h.Runtime.Create(t.Context(), runtime.Config{
		ID: sandbox.NewID(), RootFS: rootfs, Dir: dir, GuestInit: "/bin/true", Slot: h.Slot(t), Hostname: "host",
		Resources: sandbox.Resources{CPUs: 1, MemoryMiB: 128, DiskMiB: 64, PIDs: 64},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer inst.Stop(context.Background())
	fill, err := os.Create(filepath.Join(dir, "fill"))
	if err != nil {
		t.Fatal(err)
	}
	defer fill.Close()
	for err == nil {
		_, err = fill.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	full := filepath.Join(dir, "image")
	if err := os.Mkdir(full, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := inst.Snapshot(t.Context(), runtime.Image{Dir: full, Kind: runtime.ImageMemory}, false); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("a snapshot into it gives %v", err)
	}
	if err := inst.Snapshot(t.Context(), runtime.Image{Dir: t.TempDir(), Kind: runtime.ImageMemory}, true); err != nil {
		t.Errorf("a snapshot elsewhere: %v", err)
	}
	// What it was lent, QEMU gives back at the end of a connection while it runs; the
	// second connection is served when the first has ended.
	for range 2 {
		if err := inst.Resume(t.Context()); err != nil {
			t.Error(err)
		}
	}
	for name := range openFiles(microvmtest.PID(t, inst)) {
		if strings.Contains(name, "memfd:devices") {
			t.Errorf("QEMU keeps %s open", name)
		}
	}
}
