package firecracker_test

import (
	"context"
	"encoding/json"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/runtime/runtimetest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

const realTag = "7e5e"

// real is what a Firecracker that can be had boots.
type real struct {
	monitor *firecracker.Monitor
	kernel  kernel.Kernel
}

// TestConformance runs on a real Firecracker, where there is one and KVM boots Linux.
func TestConformance(t *testing.T) {
	binary := os.Getenv("FIRECRACKER_BIN")
	if binary == "" {
		t.Skip("FIRECRACKER_BIN names no Firecracker")
	}
	if os.Geteuid() != 0 {
		t.Skip("virtual machines are started with namespaces and cgroups, which needs root")
	}
	base := os.Getenv("WRENN_TEST_DATA")
	if base == "" {
		base = filepath.Join(os.TempDir(), "wrenn-test")
	}
	k, err := kernel.Install(t.Context(), filepath.Join(base, "kernels"), kernel.Options{})
	if err != nil {
		t.Fatal(err)
	}
	_, socket := startPager(t)
	cfg := throughPager(socket)
	cfg.Binary, cfg.Data = binary, t.TempDir()
	m, err := firecracker.New(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Probe(t.Context(), k); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	mount := filepath.Join(dir, "disks")
	if err := os.Mkdir(mount, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := disk.Mount(t.Context(), mount, filepath.Join(dir, "disks.xfs"), 8<<30); err != nil {
		t.Fatal(err)
	}
	before := os.Getenv("TMPDIR")
	os.Setenv("TMPDIR", mount) // t.Setenv would keep the suite from running in parallel
	t.Cleanup(func() {
		os.Setenv("TMPDIR", before)
		if err := disk.Unmount(mount); err != nil {
			t.Error(err)
		}
	})
	runtimetest.Run(t, real{m, k}.harness)
}

func (r real) open(t *testing.T, disks string) *microvm.Runtime {
	rt, err := microvm.New(microvm.Config{Monitor: r.monitor, Kernel: r.kernel, Disks: disks, Tag: realTag, Log: slog.New(slog.DiscardHandler)})
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

func (r real) harness(t *testing.T) runtimetest.Harness {
	disks := t.TempDir()
	t.Cleanup(func() {
		if err := microvm.RemoveAll(realTag); err != nil {
			t.Error(err)
		}
		for _, left := range leftovers(t, "wrenn-"+realTag) {
			t.Error("left after RemoveAll:", left)
		}
	})
	pool, err := network.Open(t.Context(), network.Config{
		Tag: realTag, TAP: true, CIDR: netip.MustParsePrefix("10.236.0.0/24"), Log: slog.New(slog.DiscardHandler),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pool.Close(context.Background())
		network.RemoveAll(context.Background(), realTag)
	})
	return runtimetest.Harness{
		Runtime: r.open(t, disks),
		Reopen:  func(t *testing.T) runtime.Runtime { return r.open(t, disks) },
		Slot: func(t *testing.T) *network.Slot {
			slot, err := pool.Acquire(t.Context(), network.Policy{AllowInternet: true})
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { pool.Release(context.Background(), slot) })
			if err := slot.Prepare(); err != nil {
				t.Fatal(err)
			}
			return slot
		},
		Outside:    func(t *testing.T) netip.AddrPort { return runtimetest.Outside(t, realTag) },
		KillEngine: kill,
		// A machine that is being paused runs until it is stopped.
		BeginPause: func(*testing.T, runtime.Instance) {},
		Corrupt: func(t *testing.T, image runtime.Image) {
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
		},
		Leftovers: func(t *testing.T, id sandbox.ID) []string { return leftovers(t, string(id)) },
	}
}

func kill(t *testing.T, inst runtime.Instance) {
	var state struct {
		Machine struct {
			Process struct{ PID int }
		}
	}
	if err := json.Unmarshal(inst.State(), &state); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(state.Machine.Process.PID, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
}

// leftovers names what is on the host that has name in it.
func leftovers(t *testing.T, name string) []string {
	var left []string
	procs, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range procs {
		if line, err := os.ReadFile(p); err == nil && strings.Contains(string(line), name) {
			left = append(left, "process "+p)
		}
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), name) {
		left = append(left, "mount of "+name)
	}
	_ = filepath.WalkDir("/sys/fs/cgroup", func(path string, _ fs.DirEntry, _ error) error { // groups of others come and go
		if strings.Contains(filepath.Base(path), name) {
			left = append(left, path)
		}
		return nil
	})
	return left
}
