package firecracker_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker/fake"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Which jailer is taken, of those that may be there.
func TestFindJailer(t *testing.T) {
	s := newSite(t)
	t.Setenv("PATH", t.TempDir())
	put := func(dir, name string) string {
		path := filepath.Join(dir, name)
		if err := os.Link(s.binary, path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	confinement := func(binary, jailer string) string {
		f, err := firecracker.New(t.Context(), firecracker.Config{Binary: binary, Jailer: jailer, Data: t.TempDir()})
		if err != nil {
			t.Fatal(err)
		}
		return f.Confinement()
	}
	want := func(got, words string) {
		t.Helper()
		if !strings.Contains(got, words) {
			t.Errorf("machines are confined by %q, want %q", got, words)
		}
	}
	dir := t.TempDir()
	binary := put(dir, fake.Prefix+"1.15.1")
	want(confinement(binary, ""), "neither beside it nor in PATH")
	beside := put(dir, fake.JailerPrefix+"1.15.1")
	want(confinement(binary, ""), "Firecracker's jailer "+beside)
	want(confinement(binary, firecracker.NoJailer), "not to be used")

	// A link to it elsewhere.
	link := filepath.Join(t.TempDir(), filepath.Base(binary))
	if err := os.Symlink(binary, link); err != nil {
		t.Fatal(err)
	}
	want(confinement(link, ""), "Firecracker's jailer "+beside)

	// Both in PATH.
	bin := t.TempDir()
	t.Setenv("PATH", bin)
	for name, says := range map[string]string{"firecracker": "Firecracker", "jailer": "Jailer"} {
		if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\necho "+says+" v1.14.0\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	want(confinement("", ""), "Firecracker's jailer "+filepath.Join(bin, "jailer"))

	// One of another version.
	other := put(t.TempDir(), fake.Prefix+"1.15.0")
	want(confinement(other, ""), "is of version 1.14.0, and Firecracker of 1.15.0")
	for _, jailer := range []string{beside, "/bin/false", filepath.Join(dir, "missing")} {
		if _, err := firecracker.New(t.Context(), firecracker.Config{Binary: other, Jailer: jailer}); !errors.Is(err, sandbox.ErrUnavailable) {
			t.Errorf("with the jailer %s: %v", jailer, err)
		}
	}
}

// A jailer that refuses says why, and leaves no files.
func TestJailerRefuses(t *testing.T) {
	s := newSite(t)
	m := s.machine(t)
	m.ID = "a_b"
	s.jailer = true
	f := s.monitor(t, "1.15.1", firecracker.Config{})
	if _, err := f.Boot(t.Context(), m); err == nil || !strings.Contains(err.Error(), "invalid instance ID") {
		t.Errorf("boot: %v", err)
	}
	if in, err := os.ReadDir(m.Jail()); err != nil || len(in) > 0 {
		t.Errorf("left in the jail: %v (%v)", in, err)
	}
}
