package firecracker_test

import (
	"os"
	"testing"

	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/runtime/microvm/microvmtest"
	"github.com/wrenn/wrenn/internal/runtime/runtimetest"
)

// TestConformance runs on a real Firecracker, where there is one and KVM boots Linux.
func TestConformance(t *testing.T) {
	binary := os.Getenv("FIRECRACKER_BIN")
	if binary == "" {
		t.Skip("FIRECRACKER_BIN names no Firecracker")
	}
	if os.Geteuid() != 0 {
		t.Skip("virtual machines are started with namespaces and cgroups, which needs root")
	}
	k, err := microvmtest.Kernel(t.Context())
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
	unmount, err := microvmtest.MountDisks(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unmount(); err != nil {
			t.Error(err)
		}
	})
	runtimetest.Run(t, microvmtest.Site{Monitor: m, Kernel: k, Tag: "7e5e", CIDR: "10.236.0.0/24"}.Harness)
}
