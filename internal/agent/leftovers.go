package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/wrenn/wrenn/internal/disk"
)

// RemoveRunning removes from an agent's directory, which no agent uses, the files
// of everything that runs or ran. Paused sandboxes, snapshots and the memory images
// of templates stay.
func RemoveRunning(dir string) error {
	if err := disk.RemoveAll(filepath.Join(dir, "instances")); err != nil {
		return fmt.Errorf("remove instances' files: %w", err)
	}
	sandboxes := filepath.Join(dir, "sandboxes")
	entries, err := os.ReadDir(sandboxes)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("remove sandboxes' files: %w", err)
	}
	for _, e := range entries {
		m := newManaged(record{}, filepath.Join(sandboxes, e.Name()))
		if _, err := os.Stat(filepath.Join(m.imageDir(), manifestFile)); err == nil {
			continue
		}
		if err := os.RemoveAll(m.dir); err != nil {
			return fmt.Errorf("remove sandboxes' files: %w", err)
		}
	}
	return nil
}
