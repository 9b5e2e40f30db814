package runtimetest

// What harnesses of all runtimes need of the host.

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn/wrenn/internal/network"
)

// Slots opens a pool of network slots, which ends with the test. What it returns is
// for Harness.Slot.
func Slots(t *testing.T, cfg network.Config) func(t *testing.T) *network.Slot {
	t.Helper()
	pool, err := network.Open(t.Context(), cfg, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		pool.Close(context.Background())
		network.RemoveAll(context.Background(), cfg.Tag)
	})
	return func(t *testing.T) *network.Slot {
		t.Helper()
		slot, err := pool.Acquire(t.Context(), network.Policy{AllowInternet: true})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { pool.Release(context.Background(), slot) })
		if err := slot.Prepare(); err != nil {
			t.Fatal(err)
		}
		return slot
	}
}

// Leftovers names the processes, mounts and cgroups on the host that have name in
// their arguments, path or cgroup, and the files below dirs that have it in theirs. It
// is for Harness.Leftovers.
func Leftovers(t *testing.T, name string, dirs ...string) []string {
	t.Helper()
	var left []string
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		for _, f := range []string{"cmdline", "cgroup"} {
			if data, _ := os.ReadFile(filepath.Join(p, f)); strings.Contains(string(data), name) {
				status, _ := os.ReadFile(filepath.Join(p, "stat"))
				left = append(left, fmt.Sprintf("process %s (%s): %q %.60s", p, f, data, status))
			}
		}
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), name) {
		left = append(left, "mount of "+name)
	}
	for _, dir := range append([]string{"/sys/fs/cgroup"}, dirs...) {
		_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, _ error) error { // groups of others come and go
			if strings.Contains(filepath.Base(path), name) {
				left = append(left, path)
			}
			return nil
		})
	}
	return left
}
