package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// restLimit bounds the compression of one image.
const restLimit = 30 * time.Minute

// compressResting makes the images of sandboxes smaller that have been paused for
// long, one at a time, until the agent ends.
func (a *Agent) compressResting() {
	tick := time.NewTicker(min(a.cfg.CompressAfter, time.Minute))
	defer tick.Stop()
	looked := map[sandbox.ID]time.Time{} // which pause of a sandbox was looked at
	for {
		select {
		case <-a.ctx.Done():
			return
		case <-tick.C:
		}
		paused := map[sandbox.ID]time.Time{}
		for _, m := range a.list() {
			rec, _, _ := m.status()
			if rec.State != sandbox.Paused {
				continue
			}
			since := rec.Changed
			if !looked[m.id].Equal(since) && time.Since(since) >= a.cfg.CompressAfter {
				err := a.compress(m)
				if err != nil && !errors.Is(err, context.Canceled) {
					a.log.Warn("the image of a paused sandbox stays as large as it is", "sandbox", m.id, "err", err)
				}
				// Else there may be room, or nothing in its way, another time.
				if !errors.Is(err, sandbox.ErrExhausted) && !errors.Is(err, context.Canceled) {
					looked[m.id] = since
				}
			}
			if looked[m.id].Equal(since) {
				paused[m.id] = since
			}
		}
		looked = paused
	}
}

// compress puts a smaller image in the place of that of a paused sandbox. The sandbox
// is not held up: when it is resumed meanwhile, that is given up and nothing has been done.
func (a *Agent) compress(m *managed) error {
	ctx, cancel := context.WithTimeout(a.ctx, restLimit)
	defer cancel()
	m.rest(cancel)
	if rec, _, _ := m.status(); rec.State != sandbox.Paused { // it went on in between
		return nil
	}
	began := time.Now()
	im, err := openImage(m.imageDir(), a.cfg.Runtime)
	if errors.Is(err, sandbox.ErrNotFound) {
		return nil
	}
	if err != nil {
		return err
	}
	if im.Kind != runtime.ImageMemory || im.Compressed {
		return nil
	}
	if err := a.admitDisk(im.bytes()); err != nil {
		return err
	}
	tmp := smaller(m.imageDir())
	if err := errors.Join(os.RemoveAll(tmp), os.Mkdir(tmp, 0o700)); err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	err = a.cfg.Runtime.Compress(ctx, im.runtime(), tmp)
	if errors.Is(err, errors.ErrUnsupported) {
		return nil
	}
	var small image
	if err == nil {
		next := im.manifest
		next.Compressed, next.Bytes = true, 0
		small, err = writeImage(tmp, next)
	}
	if err == nil {
		err = a.exchange(m, im, small, tmp)
	}
	if rec, _, _ := m.status(); rec.State != sandbox.Paused || errors.Is(err, sandbox.ErrNotFound) || errors.Is(err, sandbox.ErrConflict) {
		return nil // it goes on, or is gone
	}
	if err != nil {
		return err
	}
	a.log.Info("image of a paused sandbox compressed", "sandbox", m.id, "bytes", im.bytes(), "now", small.bytes(), "took", time.Since(began))
	return nil
}

// smaller is where a smaller image is written before it takes the place of that in dir.
func smaller(dir string) string {
	return filepath.Join(filepath.Dir(dir), ".small-"+filepath.Base(dir))
}

// exchange puts the image small, in tmp, in the place of the one that m has, and the other
// way round, if m is still paused with it.
func (a *Agent) exchange(m *managed, of, small image, tmp string) error {
	_, done, err := a.transition(a.ctx, m, teardownLimit, sandbox.Paused)
	if err != nil {
		return err
	}
	defer done()
	now, err := openImage(m.imageDir(), a.cfg.Runtime)
	if err != nil {
		return err
	}
	if !now.Created.Equal(of.Created) {
		return sandbox.Errorf(sandbox.ErrConflict, "sandbox %s has another image now", m.id)
	}
	if err := unix.Renameat2(unix.AT_FDCWD, tmp, unix.AT_FDCWD, m.imageDir(), unix.RENAME_EXCHANGE); err != nil {
		return fmt.Errorf("exchange images: %w", err)
	}
	return errors.Join(syncPath(m.dir), m.setState(sandbox.Paused, func(r *record) { r.ImageBytes = small.bytes() }))
}
