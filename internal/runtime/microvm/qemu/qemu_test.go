package qemu_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/microvm/microvmtest"
	"github.com/wrenn/wrenn/internal/runtime/microvm/qemu"
	"github.com/wrenn/wrenn/internal/runtime/runtimetest"
)

var (
	site  = microvmtest.Site{Tag: "7e5a", CIDR: "10.234.0.0/24"}
	disks *os.File // directory that the tests' file system is mounted at
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
	ctx := context.Background()
	var err error
	if site.Kernel, err = microvmtest.Kernel(ctx); err != nil {
		return fail(err)
	}
	if site.Monitor, err = qemu.New(ctx, qemu.Config{Accelerator: qemu.TCG}); err != nil {
		return fail(err)
	}
	dir, err := os.MkdirTemp("", "wrenn-qemu-")
	if err != nil {
		return fail(err)
	}
	defer os.RemoveAll(dir)
	unmount, err := microvmtest.MountDisks(ctx, dir)
	if err != nil {
		return fail(err)
	}
	defer unmount()
	if disks, err = os.Open(os.Getenv("TMPDIR")); err != nil {
		return fail(err)
	}
	defer disks.Close()
	return m.Run()
}

func TestConformance(t *testing.T) { runtimetest.Run(t, harness) }

func harness(t *testing.T) runtimetest.Harness {
	t.Cleanup(func() { // when all machines have been removed
		for _, left := range zombies() {
			t.Error("left after RemoveAll:", left)
		}
	})
	h := site.Harness(t)
	h.KillEngine = func(t *testing.T, inst runtime.Instance) {
		checkConsole(t, microvmtest.PID(t, inst))
		microvmtest.Kill(t, inst)
	}
	h.HoldDisk = holdDisks
	return h
}

// holdDisks freezes the file system that the tests have for themselves.
func holdDisks(t *testing.T) (release func()) {
	const (
		freeze = 0xc0045877 // FIFREEZE
		thaw   = 0xc0045878 // FITHAW
	)
	if err := unix.IoctlSetInt(int(disks.Fd()), freeze, 0); err != nil {
		t.Fatal("freeze disks:", err)
	}
	release = sync.OnceFunc(func() {
		if err := unix.IoctlSetInt(int(disks.Fd()), thaw, 0); err != nil {
			t.Error("thaw disks:", err)
		}
	})
	t.Cleanup(release)
	return release
}

// openFiles are the names of what a process has open.
func openFiles(pid int) map[string]bool {
	links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	open := map[string]bool{}
	for _, link := range links {
		if to, err := os.Readlink(link); err == nil {
			open[filepath.Base(to)] = true
		}
	}
	return open
}

// checkConsole says whether QEMU reads what it has written to the console itself, and
// takes it away from the agent: it does when it has not found a pipe for each way.
func checkConsole(t *testing.T, pid int) {
	open := openFiles(pid)
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
