package memory

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"

	"golang.org/x/sync/errgroup"
)

const (
	copyPiece = 256 << 10 // fits a core's cache
	copySpan  = 8 << 20   // of the image, is one thread's at a time
)

// CopyTo fills f, an empty file, with the memory: it gets its size, and what is
// not zero is written. All of it is checked on the way.
func (img *Image) CopyTo(ctx context.Context, f *os.File) error {
	if err := f.Truncate(img.Size()); err != nil {
		return fmt.Errorf("copy memory image: %w", full(err))
	}
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range max(runtime.GOMAXPROCS(0), 2) {
		g.Go(func() error {
			buf := make([]byte, copyPiece)
			for ctx.Err() == nil {
				at := next.Add(copySpan) - copySpan
				if at >= img.Size() {
					return nil
				}
				if err := img.copySpan(ctx, f, buf, at, min(at+copySpan, img.Size())); err != nil {
					return err
				}
			}
			return ctx.Err()
		})
	}
	if err := g.Wait(); err != nil {
		return fmt.Errorf("copy memory image: %w", full(err))
	}
	return nil
}

// copySpan copies a part of the image. Runs that follow each other are read one by
// one and written together.
func (img *Image) copySpan(ctx context.Context, f *os.File, buf []byte, at, end int64) error {
	filled, start := 0, at
	flush := func() error {
		if filled == 0 {
			return nil
		}
		_, err := f.WriteAt(buf[:filled], start)
		filled = 0
		return err
	}
	for at < end {
		r := img.Find(at)
		if r.Layer == nil {
			if err := flush(); err != nil {
				return err
			}
			at += min(r.Length, end-at)
			continue
		}
		if filled == 0 {
			start = at
		}
		n := int(min(r.Length, end-at, int64(len(buf)-filled)))
		if err := r.Layer.read(buf[filled:][:n], r.At); err != nil {
			return err
		}
		filled += n
		at += int64(n)
		if filled == len(buf) {
			if err := flush(); err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
		}
	}
	return flush()
}
