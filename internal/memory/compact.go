package memory

import (
	"context"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"strings"
)

// longChain is how many layers an image may have before they are put together: each
// pause adds one.
const longChain = 8

// Shorten compacts the image that lies in dir if it has many layers.
func Shorten(ctx context.Context, dir string) error {
	img, err := Open(dir)
	if err != nil {
		return err
	}
	n := len(img.layers)
	if err := img.Close(); err != nil || n <= longChain {
		return err
	}
	return Compact(ctx, dir)
}

// Compact makes the image that lies in dir one of two layers at most, and removes
// what a kill left there. A layer that makes up most of the image stays as it is:
// it may be shared with other images. Whoever has the image open goes on with it
// as it was. A kill leaves the image as it was or as it is to be. One Write or
// Compact of a directory at a time, and none while its files are linked elsewhere.
func Compact(ctx context.Context, dir string) error {
	if err := compact(ctx, dir); err != nil {
		return fmt.Errorf("compact memory image: %w", full(err))
	}
	return nil
}

func compact(ctx context.Context, dir string) error {
	img, err := Open(dir)
	if err != nil {
		return err
	}
	defer img.Close()
	h := img.header
	if len(h.layers) > 2 {
		if h, err = img.merge(ctx); err != nil {
			return err
		}
	}
	return sweep(dir, h)
}

// merge writes all layers but one, or all, as a new one, and the header of it.
func (img *Image) merge(ctx context.Context) (h header, err error) {
	live := make([]uint64, len(img.layers))
	for _, r := range img.runs {
		if r.layer != zero {
			live[r.layer] += uint64(r.n)
		}
	}
	keep := 0
	for i, n := range live {
		if n > live[keep] {
			keep = i
		}
	}
	// Most of it is in use, and it is most of the image.
	if live[keep] < img.layers[keep].ref.blocks/2 || live[keep]*2 < uint64(img.Stored()/BlockSize) {
		keep = -1
	}
	w, err := newLayer(img.dir)
	if err != nil {
		return h, err
	}
	defer w.discard()
	h = header{blocks: img.blocks, layers: append([]layerRef(nil), img.header.layers...), runs: img.runs}
	b := builder{w: w, source: layersSource{img, keep}, layer: int32(len(h.layers)), blocks: h.blocks}
	if err := b.build(ctx); err != nil {
		return h, err
	}
	h.layers = append(h.layers, w.ref)
	h.runs = overlay(h.runs, b.runs)
	h.prune()
	return h, finish(img.dir, h, w)
}

// layersSource has the blocks of all layers but one.
type layersSource struct {
	img  *Image
	keep int
}

func (s layersSource) Dirty(context.Context) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		for _, r := range s.img.runs {
			if r.layer == zero || int(r.layer) == s.keep {
				continue
			}
			if !yield(Range{int64(r.start) * BlockSize, int64(r.n) * BlockSize}, nil) {
				return
			}
		}
	}
}

func (s layersSource) Read(ctx context.Context, p []byte, ranges []Range) error {
	for _, r := range ranges {
		if _, err := s.img.ReadAt(p[:r.Length], r.Offset); err != nil {
			return err
		}
		p = p[r.Length:]
	}
	return ctx.Err()
}

// sweep removes files of images that h does not need.
func sweep(dir string, h header) error {
	needed := map[string]bool{}
	for _, l := range h.layers {
		needed[l.fileName()], needed[l.fileName()+compressedSuffix] = true, true
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		if strings.HasPrefix(name, tempPrefix) || IsLayer(name) && !needed[name] {
			if err := os.Remove(filepath.Join(dir, name)); err != nil {
				return err
			}
		}
	}
	return nil
}
