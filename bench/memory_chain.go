package bench

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/memory/pager"
)

// chainPauses is after how many pauses the memory of a machine is brought in, beside
// after one.
const chainPauses = 30

// freshPages is a memory of which some pages have new bytes.
type freshPages struct {
	pages []int // in order
	rnd   *rand.ChaCha8
}

// Dirty implements memory.Source.
func (f freshPages) Dirty(context.Context) iter.Seq2[memory.Range, error] {
	return func(yield func(memory.Range, error) bool) {
		for _, p := range f.pages {
			if !yield(memory.Range{Offset: int64(p) * 4096, Length: 4096}, nil) {
				return
			}
		}
	}
}

// Read implements memory.Source.
func (f freshPages) Read(_ context.Context, p []byte, _ []memory.Range) error {
	_, err := f.rnd.Read(p)
	return err
}

// measureChain pauses and resumes again and again, as the runtime does: what a machine
// was loaded from is compacted beside it where it has many layers, and the next image
// is what has changed since.
func (b *memoryBench) measureChain(ctx context.Context) error {
	rnd := rand.NewChaCha8([32]byte{4})
	images := []string{b.image}
	for n := range chainPauses {
		dir, err := b.pauseAgain(ctx, images[n], n, rnd)
		if err != nil {
			return err
		}
		images = append(images, dir)
	}
	all := make([]uint32, b.size/4096)
	for i := range all {
		all[i] = uint32(i)
	}
	set := filepath.Join(b.dir, "all")
	if err := pager.WriteWorkingSet(set, all); err != nil {
		return err
	}
	one, many := images[1], images[chainPauses]
	var took, floor samples
	for range b.Samples {
		for _, c := range []struct {
			image string
			to    *samples
		}{{one, &floor}, {many, &took}} {
			open, err := timed(func() error {
				img, err := memory.Open(c.image)
				if err != nil {
					return err
				}
				return img.Close()
			})
			if err != nil {
				return err
			}
			present, err := b.prefetch(ctx, c.image, set)
			if err != nil {
				return err
			}
			c.to.addMillis(open + present)
		}
	}
	img, err := memory.Open(many)
	if err != nil {
		return err
	}
	defer img.Close()
	runs := 0
	for range img.Runs() {
		runs++
	}
	r := took.result(fmt.Sprintf("all present after %d pauses", chainPauses), "ms").against(floor, 1.2)
	b.report(r.noted("beside after one; %d MiB, %d %% dirty each time; %d layers, %d runs", b.SizeMiB, dirtyPercent, len(img.Layers()), runs))
	return nil
}

// pauseAgain makes the image of a machine that was loaded from another.
func (b *memoryBench) pauseAgain(ctx context.Context, from string, n int, rnd *rand.ChaCha8) (_ string, err error) {
	base := filepath.Join(b.dir, fmt.Sprint("base", n))
	img, err := memory.Open(from)
	if err != nil {
		return "", err
	}
	err = img.LinkTo(base)
	if err = errors.Join(err, img.Close()); err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(base)) }()
	if err := memory.Shorten(ctx, base); err != nil {
		return "", err
	}
	parent, err := memory.Open(base)
	if err != nil {
		return "", err
	}
	defer parent.Close()
	pages := rand.Perm(b.size / 4096)[:b.size/4096*dirtyPercent/100]
	slices.Sort(pages)
	dir := filepath.Join(b.dir, fmt.Sprint("paused", n))
	if err := os.Mkdir(dir, 0o700); err != nil {
		return "", err
	}
	return dir, memory.Write(ctx, dir, int64(b.size), parent, freshPages{pages, rnd})
}
