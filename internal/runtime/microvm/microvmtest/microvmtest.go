// Package microvmtest is what the tests of the monitors share: the harness in which
// their runtimes pass the suite of package runtimetest.
package microvmtest

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/runtime/runtimetest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Site is what the machines of a package's tests are made of. Tag and addresses are
// no other package's, which may be tested at the same time.
type Site struct {
	Monitor microvm.Monitor
	Kernel  kernel.Kernel
	Tag     string
	CIDR    string
}

// Harness gives one test of the suite a runtime of its own.
func (s Site) Harness(t *testing.T) runtimetest.Harness {
	disks := t.TempDir()
	t.Cleanup(func() {
		if err := microvm.RemoveAll(s.Tag); err != nil {
			t.Error(err)
		}
		for _, left := range runtimetest.Leftovers(t, "wrenn-"+s.Tag) {
			t.Error("left after RemoveAll:", left)
		}
	})
	slot := runtimetest.Slots(t, network.Config{
		Tag: s.Tag, TAP: true, CIDR: netip.MustParsePrefix(s.CIDR), Log: slog.New(slog.DiscardHandler),
	})
	return runtimetest.Harness{
		Runtime:    s.open(t, disks),
		Reopen:     func(t *testing.T) runtime.Runtime { return s.open(t, disks) },
		Slot:       slot,
		Outside:    func(t *testing.T) netip.AddrPort { return runtimetest.Outside(t, s.Tag) },
		KillEngine: Kill,
		// A machine that is being paused runs until it is stopped.
		BeginPause: func(*testing.T, runtime.Instance) {},
		Corrupt:    corrupt,
		Leftovers:  func(t *testing.T, id sandbox.ID) []string { return runtimetest.Leftovers(t, string(id)) },
	}
}

func (s Site) open(t *testing.T, disks string) *microvm.Runtime {
	t.Helper()
	rt, err := microvm.New(microvm.Config{Monitor: s.Monitor, Kernel: s.Kernel, Disks: disks, Tag: s.Tag, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := rt.Close(); err != nil {
			t.Error(err)
		}
	})
	return rt
}

func corrupt(t *testing.T, image runtime.Image) {
	t.Helper()
	name := "root.ext4"
	if image.Kind == runtime.ImageMemory {
		name = "devices"
	}
	f, err := os.OpenFile(filepath.Join(image.Dir, name), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("not what it was"), 1024); err != nil {
		t.Fatal(err)
	}
}

// Kill ends the monitor of an instance as kill -9 would.
func Kill(t *testing.T, inst runtime.Instance) {
	t.Helper()
	if err := syscall.Kill(PID(t, inst), syscall.SIGKILL); err != nil {
		t.Error(err)
	}
}

// PID is that of an instance's monitor.
func PID(t *testing.T, inst runtime.Instance) int {
	t.Helper()
	var state struct {
		Machine struct {
			Process struct{ PID int }
		}
	}
	if err := json.Unmarshal(inst.State(), &state); err != nil {
		t.Fatal(err)
	}
	return state.Machine.Process.PID
}

// Kernel installs the kernel that guests of tests boot, where it stays for later runs.
func Kernel(ctx context.Context) (kernel.Kernel, error) {
	base := os.Getenv("WRENN_TEST_DATA")
	if base == "" {
		base = filepath.Join(os.TempDir(), "wrenn-test")
	}
	return kernel.Install(ctx, filepath.Join(base, "kernels"), kernel.Options{})
}

// MountDisks mounts a file system that can clone files below dir, and has the
// directories of tests in it until it is taken away again.
func MountDisks(ctx context.Context, dir string) (unmount func() error, err error) {
	mount := filepath.Join(dir, "disks")
	if err := os.Mkdir(mount, 0o755); err != nil {
		return nil, err
	}
	if err := disk.Mount(ctx, mount, filepath.Join(dir, "disks.xfs"), 8<<30); err != nil {
		return nil, err
	}
	before := os.Getenv("TMPDIR")
	os.Setenv("TMPDIR", mount) // t.Setenv would keep the suite from running in parallel
	return func() error {
		os.Setenv("TMPDIR", before)
		return disk.Unmount(mount, filepath.Join(dir, "disks.xfs"))
	}, nil
}
