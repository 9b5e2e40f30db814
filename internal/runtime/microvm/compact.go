package microvm

import (
	"context"
	"fmt"

	"github.com/wrenn/wrenn/internal/memory"
)

// maxLayers is how many layers the memory of an image may have before they are put
// together: each pause adds one.
const maxLayers = 8

// compact puts the layers of the memory that the machine was loaded from together,
// where they are many, so that the next image is one of few. It does so beside the
// running machine, and for one machine at a time.
func (i *instance) compact() {
	ctx, cancel := context.WithCancel(i.rt.ctx)
	over := make(chan struct{})
	i.mu.Lock()
	i.compaction = func() {
		cancel()
		<-over
	}
	i.mu.Unlock()
	i.rt.work.Go(func() {
		defer close(over)
		defer cancel()
		select {
		case i.rt.compacting <- struct{}{}:
			defer func() { <-i.rt.compacting }()
		case <-ctx.Done():
			return
		}
		// Without it the next image has more layers, and nothing else is lost.
		if err := compact(ctx, i.state.Machine.Base()); err != nil && ctx.Err() == nil {
			i.rt.cfg.Log.Warn("the layers of a sandbox's memory stay as many as they are", "sandbox", i.id, "err", err)
		}
	})
}

// endCompaction ends what compact began, and waits for it: it writes where an image is
// about to be taken of, or all is about to be removed.
func (i *instance) endCompaction() {
	i.mu.Lock()
	end := i.compaction
	i.mu.Unlock()
	if end != nil {
		end()
	}
}

func compact(ctx context.Context, dir string) error {
	image, err := memory.Open(dir)
	if err != nil {
		return err
	}
	n := len(image.Layers())
	if err := image.Close(); err != nil {
		return fmt.Errorf("close memory image: %w", err)
	}
	if n <= maxLayers {
		return nil
	}
	return memory.Compact(ctx, dir)
}
