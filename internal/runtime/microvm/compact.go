package microvm

import (
	"context"

	"github.com/wrenn/wrenn/internal/memory"
)

// compact puts the layers of the memory that the machine was loaded from together,
// where they are many, so that the next image is one of few. It does so beside the
// running machine, and for one machine at a time.
func (i *instance) compact() {
	ctx, cancel := context.WithCancel(i.rt.set.Context())
	over := make(chan struct{})
	i.mu.Lock()
	i.compaction = func() {
		cancel()
		<-over
	}
	i.mu.Unlock()
	i.rt.set.Go(func() {
		defer close(over)
		defer cancel()
		select {
		case i.rt.compacting <- struct{}{}:
			defer func() { <-i.rt.compacting }()
		case <-ctx.Done():
			return
		}
		// Without it the next image has more layers, and nothing else is lost.
		if err := memory.Shorten(ctx, i.state.Machine.Base()); err != nil && ctx.Err() == nil {
			i.rt.cfg.Log.Warn("the layers of a sandbox's memory stay as many as they are", "sandbox", i.ID, "err", err)
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
