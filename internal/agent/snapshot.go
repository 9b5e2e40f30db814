package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func (a *Agent) imagesDir() string { return filepath.Join(a.cfg.Dir, "images") }

func (a *Agent) imageDir(id sandbox.ID) string { return filepath.Join(a.imagesDir(), string(id)) }

// snapshot writes an image of m under the id. m goes on running, or is paused as
// before.
func (a *Agent) snapshot(ctx context.Context, m *managed, id sandbox.ID) (image, error) {
	ctx, done, err := a.transition(ctx, m, imageLimit, sandbox.Running, sandbox.Paused)
	if err != nil {
		return image{}, err
	}
	defer done()
	dir := a.imageDir(id)
	if _, err := os.Stat(dir); err == nil {
		return image{}, sandbox.Errorf(sandbox.ErrConflict, "image id %s is taken", id)
	}
	began := time.Now()
	var im image
	if u := m.unit; u != nil {
		im, err = a.writeAndSeal(ctx, u, dir, m.manifest(a, runtime.ImageMemory, a.environment(ctx, u)), false)
	} else if im, err = openImage(m.imageDir(), a.cfg.Runtime); err == nil {
		im, err = im.copyTo(dir)
	} else {
		err = unusable(err)
	}
	if err != nil {
		return im, fmt.Errorf("snapshot sandbox %s: %w", m.id, err)
	}
	a.log.Info("sandbox snapshotted", "sandbox", m.id, "image", id, "bytes", im.bytes(), "took", time.Since(began))
	return im, nil
}

// images returns the images that snapshot has made, by id.
func (a *Agent) images() (map[sandbox.ID]image, error) {
	entries, err := os.ReadDir(a.imagesDir())
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	found := make(map[sandbox.ID]image, len(entries))
	for _, e := range entries {
		id, err := sandbox.ParseID(e.Name())
		if err != nil {
			continue
		}
		im, err := openImage(a.imageDir(id), a.cfg.Runtime)
		if errors.Is(err, sandbox.ErrNotFound) && im.Created.IsZero() {
			if info, err := e.Info(); err == nil {
				im.Created = info.ModTime() // without a manifest: being deleted
			}
		}
		found[id] = im
	}
	return found, nil
}

// sweepImages removes what a killed agent left half-written.
func (a *Agent) sweepImages() error {
	for _, dir := range []string{a.imagesDir(), a.pool.dir()} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return fmt.Errorf("sweep images: %w", err)
		}
		for _, e := range entries {
			if strings.HasPrefix(e.Name(), ".new-") {
				if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
					return fmt.Errorf("sweep images: %w", err)
				}
			}
		}
	}
	return nil
}
