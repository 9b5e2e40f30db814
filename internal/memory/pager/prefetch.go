package pager

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// stretch is a part of the memory that is put in without being asked for.
type stretch struct{ offset, length int64 }

// together is how many pages of a working set are put in in the order of the memory:
// those that were touched at about the same time.
const together = 256

// stretches joins pages that follow each other into pieces, in the order in which they
// were touched by and large.
func stretches(blocks []uint32, page, size int64) []stretch {
	var out []stretch
	blocks = slices.Clone(blocks)
	for part := range slices.Chunk(blocks, together) {
		slices.Sort(part)
	}
	for _, b := range blocks {
		at := int64(b) * 4096 / page * page
		if at >= size {
			continue // of another memory
		}
		if i := len(out) - 1; i >= 0 && out[i].offset+out[i].length == at && out[i].length < pieceSize {
			out[i].length += page
			continue
		}
		out = append(out, stretch{at, page})
	}
	return out
}

// prefetchers is how many put a working set in, where so many threads serve faults.
func prefetchers(threads int) int { return max(threads, 2) }

// prefetch puts a recorded working set in, in its order, and returns when all of
// it is there.
func (s *server) prefetch(ctx context.Context, blocks []uint32) error {
	todo := stretches(blocks, s.page, s.image.Size())
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		s.readAhead(ctx, todo)
		return nil
	})
	for range prefetchers(s.threads) {
		g.Go(func() error {
			buf := s.buffer(pieceSize)
			for {
				i := next.Add(1) - 1
				if i >= int64(len(todo)) {
					return nil
				}
				if err := s.fillAll(ctx, todo[i], buf); err != nil {
					return err
				}
			}
		})
	}
	return g.Wait()
}

// readAhead has the disk read ahead of the copying. Where some of a number of pieces
// are looked at and are all in the page cache, the others are taken to be there: to ask
// for what is there takes as long as to copy it.
func (s *server) readAhead(ctx context.Context, todo []stretch) {
	const number, some = 64, 8
	for len(todo) > 0 && ctx.Err() == nil {
		part := todo[:min(number, len(todo))]
		todo = todo[len(part):]
		cached := true
		for i := 0; i < len(part) && cached; i += number / some {
			cached = s.image.Find(part[i].offset).Cached()
		}
		for i := 0; i < len(part) && !cached; i++ {
			s.advise(part[i])
		}
	}
}

func (s *server) advise(t stretch) {
	r := s.image.Find(t.offset)
	if r.Layer != nil && r.Layer.File() != nil {
		_ = unix.Fadvise(int(r.Layer.File().Fd()), r.At, min(r.Length, t.length), unix.FADV_WILLNEED)
	}
}

func (s *server) fillAll(ctx context.Context, t stretch, buf []byte) error {
	for t.length > 0 {
		var n int64
		err := retry(ctx, func() (err error) {
			s.hook("fill")
			n, err = s.fill(t.offset, t.length, buf)
			return err
		})
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		t.offset += n
		t.length -= n
	}
	return nil
}

const (
	backgroundPiece = 1 << 20
	backgroundRest  = 5 * time.Millisecond // after each: 200 MB/s at most
)

// background puts in the rest of what is not zero, slowly, up to budget bytes and while
// the host has memory to spare, and leaves the disk and the CPU alone while faults are
// served.
func (s *server) background(ctx context.Context, budget int64) error {
	buf := s.buffer(sequential)
	begin := s.copied.Load()
	for r := range s.image.Runs() {
		if r.Layer == nil {
			continue
		}
		end := r.Offset + r.Length
		for at := r.Offset / s.page * s.page; at < end; at += backgroundPiece {
			if s.copied.Load()-begin >= budget || memoryShort() {
				return nil
			}
			for before := int64(-1); before != s.served.Load(); {
				before = s.served.Load()
				if err := pause(ctx, backgroundRest); err != nil {
					return err
				}
			}
			if err := s.fillAll(ctx, stretch{at, min(backgroundPiece, (end-at+s.page-1)/s.page*s.page)}, buf); err != nil {
				return err
			}
		}
	}
	return nil
}

// ended says whether an error only means that it is over.
func ended(err error) bool {
	return err == nil || errors.Is(err, errEnded) || errors.Is(err, context.Canceled)
}
