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
	i.endCompaction = func() {
		cancel()
		<-over
	}
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
