package qemu_test

import (
	"context"
	"encoding/json"
	"fmt"
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
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/runtime/microvm/qemu"
	"github.com/wrenn/wrenn/internal/runtime/runtimetest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

const tag = "7e5a"

var (
	guestKernel kernel.Kernel
	monitor     *qemu.Monitor
)

func TestMain(m *testing.M) { os.Exit(run(m)) }

// run gives the tests a file system with reflinks for their directories, and a
// kernel.
func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Fprintln(os.Stderr, "skipped: virtual machines are started with namespaces and cgroups, which needs root")
		return 0
	}
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	base := os.Getenv("WRENN_TEST_DATA")
	if base == "" {
		base = filepath.Join(os.TempDir(), "wrenn-test")
	}
	ctx := context.Background()
	var err error
	if guestKernel, err = kernel.Install(ctx, filepath.Join(base, "kernels"), kernel.Options{}); err != nil {
		return fail(err)
	}
	if monitor, err = qemu.New(ctx, qemu.Config{Accelerator: qemu.TCG}); err != nil {
		return fail(err)
	}
	dir, err := os.MkdirTemp("", "wrenn-qemu-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	mount := filepath.Join(dir, "disks")
	if err := os.Mkdir(mount, 0o755); err != nil {
		return fail(err)
	}
	if err := disk.Mount(ctx, mount, filepath.Join(dir, "disks.xfs"), 8<<30); err != nil {
		return fail(err)
	}
	defer disk.Unmount(mount)
	os.Setenv("TMPDIR", mount)
	return m.Run()
}

func TestConformance(t *testing.T) { runtimetest.Run(t, harness) }

func open(t *testing.T, disks string) *microvm.Runtime {
	rt, err := microvm.New(microvm.Config{Monitor: monitor, Kernel: guestKernel, Disks: disks, Tag: tag, Log: slog.New(slog.DiscardHandler)})
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

func harness(t *testing.T) runtimetest.Harness {
	disks := t.TempDir()
	t.Cleanup(func() {
		if err := microvm.RemoveAll(tag); err != nil {
			t.Error(err)
		}
		for _, left := range append(leftovers(t, "wrenn-"+tag), zombies()...) {
			t.Error("left after RemoveAll:", left)
		}
	})
	pool, err := network.Open(t.Context(), network.Config{
		Tag: tag, TAP: true, CIDR: netip.MustParsePrefix("10.234.0.0/24"), Log: slog.New(slog.DiscardHandler),
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pool.Close(context.Background())
		network.RemoveAll(context.Background(), tag)
	})
	return runtimetest.Harness{
		Runtime: open(t, disks),
		Reopen:  func(t *testing.T) runtime.Runtime { return open(t, disks) },
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
		Outside:    func(t *testing.T) netip.AddrPort { return runtimetest.Outside(t, tag) },
		KillEngine: func(t *testing.T, inst runtime.Instance) { kill(t, inst) },
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
	checkConsole(t, state.Machine.Process.PID)
	if err := syscall.Kill(state.Machine.Process.PID, syscall.SIGKILL); err != nil {
		t.Error(err)
	}
}

// checkConsole says whether QEMU reads what it has written to the console itself, and
// takes it away from the agent: it does when it has not found a pipe for each way.
func checkConsole(t *testing.T, pid int) {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	open := map[string]bool{}
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil {
			open[filepath.Base(to)] = true
		}
	}
	if !open["console.in"] || !open["console.out"] {
		t.Errorf("QEMU has not opened the two pipes of the console; it has %v", open)
	}
}

// zombies names what has ended as a child of ours and was not waited for.
func zombies() (found []string) {
	stats, _ := filepath.Glob("/proc/[0-9]*/stat")
	for _, path := range stats {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // it has gone
		}
		var state string
		var parent int
		_, after, _ := strings.Cut(string(data), ") ")
		if _, err := fmt.Sscan(after, &state, &parent); err == nil && state == "Z" && parent == os.Getpid() {
			found = append(found, "zombie "+path)
		}
	}
	return found
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
	filepath.WalkDir("/sys/fs/cgroup", func(path string, d fs.DirEntry, err error) error {
		if strings.Contains(filepath.Base(path), name) {
			left = append(left, path)
		}
		return nil
	})
	return left
}
