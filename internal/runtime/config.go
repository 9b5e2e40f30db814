package runtime

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// GuestInitPath is where the guest finds its init. A template holds an empty file
// there for the runtime to mount the guest agent on; where it is missing, the
// first Create makes it, the only write to a template there is.
const GuestInitPath = "/usr/bin/envd"

// Config is what an instance is made from.
type Config struct {
	ID        sandbox.ID    // the instance's own, never used before: a sandbox has another one after each resume
	RootFS    string        // directory of the template's root filesystem; shared, never written
	Dir       string        // directory of the instance's own; made by the caller, removed by the caller
	GuestInit string        // host path of the static guest agent that becomes the guest's pid 1
	InitArgs  []string      // its arguments, without argv[0]
	Slot      *network.Slot // the network it is put into, prepared for this start; owned by the caller
	Hostname  string
	Resources sandbox.Resources
}

// Check refuses what no runtime makes an instance from. What a runtime needs besides,
// a slot of its kind among it, it looks at itself.
func (c Config) Check() error {
	if _, err := sandbox.ParseID(string(c.ID)); err != nil {
		return err
	}
	if res := c.Resources; res.CPUs <= 0 || res.MemoryMiB <= 0 || res.DiskMiB <= 0 || res.PIDs <= 0 {
		return sandbox.Errorf(sandbox.ErrInvalid, "resources must be above zero: %+v", res)
	}
	for _, path := range []string{c.RootFS, c.Dir, c.GuestInit} {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("path %q is not absolute", path)
		}
	}
	if info, err := os.Stat(c.RootFS); err != nil {
		return fmt.Errorf("open root filesystem: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("open root filesystem: %s is no directory", c.RootFS)
	}
	return nil
}
