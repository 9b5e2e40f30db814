package main

import (
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/agent"
	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// hostDir is a data directory on the host's disk, where a file system in a file can be
// made, with nothing mounted below it at the end.
func hostDir(t *testing.T) dataDir {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting needs root")
	}
	d, err := os.MkdirTemp("/var/tmp", "wrenn-runtime-")
	if err != nil {
		t.Fatal(err)
	}
	dir := dataDir(d)
	t.Cleanup(func() {
		unmountAll(dir.agent())
		if err := os.RemoveAll(d); err != nil {
			t.Error(err)
		}
	})
	if err := os.MkdirAll(dir.agent(), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func unmountAll(dir string) {
	for err := error(nil); err == nil; {
		err = unix.Unmount(dir, unix.MNT_DETACH)
	}
}

// keep gives the data directory the record of a sandbox, with an image.
func keep(t *testing.T, dir dataDir, id, runtime string, state sandbox.State) {
	t.Helper()
	at := filepath.Join(dir.agent(), "sandboxes", id)
	b, err := json.Marshal(map[string]any{"id": id, "runtime": runtime, "state": state})
	if err == nil {
		err = os.MkdirAll(filepath.Join(at, "image"), 0o700)
	}
	if err == nil {
		err = errors.Join(os.WriteFile(filepath.Join(at, "record.json"), b, 0o600), os.WriteFile(filepath.Join(at, "image", "manifest.json"), b, 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
}

// start does what `wrenn up` does of its start before it opens a runtime.
func start(t *testing.T, dir dataDir, name string) (string, error) {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	if err := mountDisks(t.Context(), dir); err != nil {
		return "", err
	}
	chosen, err := (&upOptions{Runtime: name}).choose(t.Context(), dir, log)
	if err != nil {
		return "", err
	}
	return chosen, prepareAgentDir(t.Context(), dir, chosen, log)
}

func kept(t *testing.T, dir dataDir) []string {
	t.Helper()
	all, _, err := agent.Runtimes(dir.agent())
	if err != nil {
		t.Fatal(err)
	}
	return all
}

const someID, otherID = "kzx60r6bvccfi5dlsumg", "aaaaaaaaaaaaaaaaaaaa"

func TestNothingIsMountedOverSandboxes(t *testing.T) {
	t.Parallel()
	dir := hostDir(t)
	if ok, err := disk.HoldsReflinks(dir.agent()); ok || err != nil {
		t.Skipf("the host's file system clones files (%v)", err)
	}
	keep(t, dir, someID, runtimeQEMU, sandbox.Paused) // as made while the disk was full
	for _, name := range []string{runtimeAuto, runtimeQEMU} {
		if got, err := start(t, dir, name); got != runtimeQEMU || err != nil {
			t.Errorf("--runtime %s: %s, %v", name, got, err)
		}
		if got := kept(t, dir); !slices.Equal(got, []string{runtimeQEMU}) {
			t.Fatalf("--runtime %s: the sandboxes that are left are of %v", name, got)
		}
	}
	// A file system that would hide them, or that they would hide.
	if err := os.WriteFile(dir.disks(), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := start(t, dir, runtimeQEMU); err == nil || !strings.Contains(err.Error(), dir.disks()) {
		t.Errorf("with a file system beside them: %v", err)
	}
}

// TestAMountOfTheOperators has a directory of the agent that is a link to a file system of
// its own, without reflinks.
func TestAMountOfTheOperators(t *testing.T) {
	t.Parallel()
	dir := hostDir(t)
	elsewhere := filepath.Join(string(dir), "elsewhere")
	if err := os.Mkdir(elsewhere, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("wrenn-test", elsewhere, "tmpfs", 0, "size=4g"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unmountAll(elsewhere) })
	if err := os.Remove(dir.agent()); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(elsewhere, dir.agent()); err != nil {
		t.Fatal(err)
	}
	if got, err := start(t, dir, runtimeQEMU); got != runtimeQEMU || err != nil {
		t.Fatal(got, err)
	}
	if ours, err := disk.Mounted(dir.agent(), dir.disks()); !ours || err != nil {
		t.Fatalf("the file system is not there: %v", err)
	}
	keep(t, dir, someID, runtimeQEMU, sandbox.Paused)
	for range 2 { // the second has nothing of ours to unmount
		if err := down(t.Context(), string(dir), t.Output()); err != nil {
			t.Fatal(err)
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(dir.agent(), &fs); err != nil || fs.Type != unix.TMPFS_MAGIC {
			t.Fatalf("the operator's file system is gone: %x (%v)", fs.Type, err)
		}
	}
	if got, err := start(t, dir, runtimeAuto); got != runtimeQEMU || err != nil {
		t.Errorf("auto with a paused sandbox of qemu: %s, %v", got, err)
	}
	if got := kept(t, dir); !slices.Equal(got, []string{runtimeQEMU}) {
		t.Errorf("the sandboxes that are left are of %v", got)
	}
}

// TestTwoRuntimesInOneDirectory starts with each of those whose sandboxes are there, unless
// those of another run.
func TestTwoRuntimesInOneDirectory(t *testing.T) {
	t.Parallel()
	dir := dataDir(t.TempDir())
	keep(t, dir, someID, runtimeQEMU, sandbox.Paused)
	keep(t, dir, otherID, runtimeGVisor, sandbox.Paused)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	choose := func(name string) (string, error) {
		return (&upOptions{Runtime: name}).choose(t.Context(), dir, log)
	}
	for name, want := range map[string]string{runtimeAuto: runtimeGVisor, runtimeGVisor: runtimeGVisor, runtimeQEMU: runtimeQEMU} {
		if got, err := choose(name); got != want || err != nil {
			t.Errorf("--runtime %s: %s, %v", name, got, err)
		}
	}
	if got, err := choose(runtimeFirecracker); err == nil || !strings.Contains(err.Error(), "--runtime "+runtimeGVisor) {
		t.Errorf("a third: %s, %v", got, err)
	}
	keep(t, dir, someID, runtimeQEMU, sandbox.Running)
	if got, err := choose(runtimeAuto); got != runtimeQEMU || err != nil {
		t.Errorf("auto where one of qemu runs: %s, %v", got, err)
	}
	if got, err := choose(runtimeGVisor); err == nil || !strings.Contains(err.Error(), "--runtime "+runtimeQEMU) {
		t.Errorf("gvisor where one of qemu runs: %s, %v", got, err)
	}
}
