package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/runtime"
)

// Compress implements runtime.Runtime. The disk of the image shares what the template
// has, and stays as it is.
func (r *Runtime) Compress(ctx context.Context, image runtime.Image, dir string) error {
	if image.Kind != runtime.ImageMemory {
		return errors.ErrUnsupported
	}
	if err := compressImage(ctx, image, dir); err != nil {
		return fmt.Errorf("compress image: %w", err)
	}
	return nil
}

func compressImage(ctx context.Context, image runtime.Image, dir string) error {
	data, err := os.ReadFile(filepath.Join(image.Dir, imageFile))
	if err != nil {
		return err
	}
	var of manifest
	if err := json.Unmarshal(data, &of); err != nil {
		return err
	}
	for _, name := range append(slices.Collect(maps.Keys(of.Files)), imageFile) {
		if name == memory.HeaderName || name == WorkingSet || memory.IsLayer(name) {
			continue
		}
		name = filepath.Base(name)
		if err := os.Link(filepath.Join(image.Dir, name), filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	if err := os.Link(filepath.Join(image.Dir, WorkingSet), filepath.Join(dir, WorkingSet)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	saved, err := memory.Open(image.Dir)
	if err != nil {
		return err
	}
	defer saved.Close()
	return saved.CompressTo(ctx, dir)
}
