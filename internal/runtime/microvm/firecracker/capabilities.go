package firecracker

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// Version is a version of Firecracker.
type Version struct{ Major, Minor, Patch int }

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch) }

func (v Version) before(w Version) bool {
	switch {
	case v.Major != w.Major:
		return v.Major < w.Major
	case v.Minor != w.Minor:
		return v.Minor < w.Minor
	}
	return v.Patch < w.Patch
}

var versionWords = regexp.MustCompile(`\bv?(\d{1,4})\.(\d{1,4})\.(\d{1,4})`)

// ParseVersion finds the version in what Firecracker says.
func ParseVersion(text string) (Version, error) {
	m := versionWords.FindStringSubmatch(text)
	if m == nil {
		return Version{}, fmt.Errorf("%.100q is no version of Firecracker", text)
	}
	var n [3]int
	for i := range n {
		n[i], _ = strconv.Atoi(m[i+1]) // four digits at most
	}
	return Version{n[0], n[1], n[2]}, nil
}

// ProgramVersion asks the program at this path.
func ProgramVersion(ctx context.Context, binary string) (Version, error) {
	ctx, cancel := context.WithTimeout(ctx, shortTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return Version{}, fmt.Errorf("ask %s for its version: %w", binary, err)
	}
	v, err := ParseVersion(string(out))
	if err != nil {
		return Version{}, fmt.Errorf("ask %s for its version: %w", binary, err)
	}
	return v, nil
}

// Capabilities are what a version can do.
type Capabilities struct {
	Version  Version
	Snapshot int // version of the format; none loads another's

	NetworkOverrides    bool // another TAP at load
	PageSize            bool // page_size, in bytes, in what is sent to the pager
	CPUConfig           bool // PUT /cpu-config
	TrackDirtyAtLoad    bool // by its new name; before it is enable_diff_snapshots
	DiffWithoutTracking bool // of all resident pages, with swap off
	PCI                 bool // --enable-pci
	SerialPath          bool // PUT /serial
	BalloonHinting      bool // free pages are told and reported
	DiffAbove3GiB       bool // without corruption
	VsockOverride       bool
	ClockRealtime       bool
	AsyncFaults         bool // survive a snapshot; before, guests boot with no-kvmapf
	VsockAfterLoad      bool // works
}

// formats has the version of the snapshot format by minor version.
var formats = map[int]int{12: 6, 13: 8, 14: 8, 15: 9, 16: 10}

// since says from which version on there is what.
var since = []struct {
	version Version
	has     func(*Capabilities) *bool
}{
	{Version{1, 12, 0}, func(c *Capabilities) *bool { return &c.NetworkOverrides }},
	{Version{1, 12, 0}, func(c *Capabilities) *bool { return &c.PageSize }},
	{Version{1, 12, 0}, func(c *Capabilities) *bool { return &c.CPUConfig }},
	{Version{1, 13, 0}, func(c *Capabilities) *bool { return &c.TrackDirtyAtLoad }},
	{Version{1, 13, 0}, func(c *Capabilities) *bool { return &c.DiffWithoutTracking }},
	{Version{1, 13, 0}, func(c *Capabilities) *bool { return &c.PCI }},
	{Version{1, 14, 0}, func(c *Capabilities) *bool { return &c.SerialPath }},
	{Version{1, 14, 0}, func(c *Capabilities) *bool { return &c.BalloonHinting }},
	{Version{1, 15, 0}, func(c *Capabilities) *bool { return &c.DiffAbove3GiB }},
	{Version{1, 16, 0}, func(c *Capabilities) *bool { return &c.VsockOverride }},
	{Version{1, 16, 0}, func(c *Capabilities) *bool { return &c.ClockRealtime }},
	{Version{1, 16, 0}, func(c *Capabilities) *bool { return &c.AsyncFaults }},
	{Version{1, 16, 1}, func(c *Capabilities) *bool { return &c.VsockAfterLoad }},
}

// CapabilitiesOf says what a version can do. One that is not known is refused: what
// its snapshots are worth cannot be said.
func CapabilitiesOf(v Version) (Capabilities, error) {
	format, ok := formats[v.Minor]
	if v.Major != 1 || !ok {
		return Capabilities{}, sandbox.Errorf(sandbox.ErrInvalid, "Firecracker %s is not supported: install a version from 1.12 to 1.16", v)
	}
	c := Capabilities{Version: v, Snapshot: format}
	for _, s := range since {
		*s.has(&c) = !v.before(s.version)
	}
	return c, nil
}

// KernelArgs are words for the guest's command line that the version asks for.
func (c Capabilities) KernelArgs() []string {
	if c.AsyncFaults {
		return nil
	}
	return []string{"no-kvmapf"} // tasks that wait for such a fault would never go on after a load
}
