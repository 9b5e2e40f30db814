package firecracker_test

import (
	"errors"
	"slices"
	"testing"

	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestCapabilities(t *testing.T) {
	type can = firecracker.Capabilities
	base := can{NetworkOverrides: true, PageSize: true, CPUConfig: true}
	v13 := base
	v13.TrackDirtyAtLoad, v13.DiffWithoutTracking, v13.PCI = true, true, true
	v14 := v13
	v14.SerialPath, v14.BalloonHinting = true, true
	v15 := v14
	v15.DiffAbove3GiB = true
	v16 := v15
	v16.VsockOverride, v16.ClockRealtime, v16.AsyncFaults = true, true, true
	v161 := v16
	v161.VsockAfterLoad = true
	for _, tc := range []struct {
		version string
		format  int
		want    can
		args    []string
	}{
		{"1.12.0", 6, base, []string{"no-kvmapf"}}, {"1.12.1", 6, base, []string{"no-kvmapf"}},
		{"1.13.2", 8, v13, []string{"no-kvmapf"}}, {"1.14.4", 8, v14, []string{"no-kvmapf"}},
		{"1.15.1", 9, v15, []string{"no-kvmapf"}}, {"1.16.0", 10, v16, nil}, {"1.16.1", 10, v161, nil},
	} {
		v, err := firecracker.ParseVersion("Firecracker v" + tc.version)
		if err != nil || v.String() != tc.version {
			t.Fatalf("parse %s: %v %v", tc.version, v, err)
		}
		got, err := firecracker.CapabilitiesOf(v)
		tc.want.Version, tc.want.Snapshot = v, tc.format
		if err != nil || got != tc.want {
			t.Errorf("%s can %+v (%v), want %+v", tc.version, got, err, tc.want)
		}
		if !slices.Equal(got.KernelArgs(), tc.args) {
			t.Errorf("%s wants %v of the kernel", tc.version, got.KernelArgs())
		}
	}
	for _, v := range []firecracker.Version{{1, 11, 0}, {1, 17, 0}, {0, 14, 0}, {2, 12, 0}} {
		if _, err := firecracker.CapabilitiesOf(v); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: %v", v, err)
		}
	}
	for _, text := range []string{"", "Firecracker", "v1.2", "99999.1.1"} {
		if v, err := firecracker.ParseVersion(text); err == nil {
			t.Errorf("%q is %v", text, v)
		}
	}
}

func TestProgramVersion(t *testing.T) {
	for _, v := range versions {
		if got, err := firecracker.ProgramVersion(t.Context(), program(t, v)); err != nil || got.String() != v {
			t.Errorf("%s says %v (%v)", v, got, err)
		}
	}
	if _, err := firecracker.ProgramVersion(t.Context(), "/bin/true"); err == nil {
		t.Error("a program that says nothing has a version")
	}
}
