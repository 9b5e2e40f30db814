package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// tempPrefix is of files that are not finished.
const tempPrefix = ".memory-"

const (
	writePiece  = 1 << 20 // is read, looked at and written at once
	writePieces = 4       // are on the way at the same time
)

// Range is a part of a memory, in bytes. Both are multiples of BlockSize.
type Range struct{ Offset, Length int64 }

// Source has the bytes that an image is made of.
type Source interface {
	// Dirty gives the ranges that may differ from the parent, or from zero without
	// one: in order, none twice.
	Dirty(ctx context.Context) iter.Seq2[Range, error]
	// Read fills p with the bytes of the ranges, one after the other.
	Read(ctx context.Context, p []byte, ranges []Range) error
}

// Write makes an image of size bytes in the directory dir, which is there: what
// source has over what parent has, which may be nil. The layers of the parent are
// linked into dir. When it returns, the image is on the disk. After an error
// nothing of it is left in dir; after a kill, files that Compact removes.
func Write(ctx context.Context, dir string, size int64, parent *Image, source Source) error {
	if err := write(ctx, dir, size, parent, source); err != nil {
		return fmt.Errorf("write memory image: %w", full(err))
	}
	return nil
}

func write(ctx context.Context, dir string, size int64, parent *Image, source Source) (err error) {
	if size < 0 || size%BlockSize != 0 || size/BlockSize >= maxBlocks {
		return fmt.Errorf("a memory cannot have %d bytes", size)
	}
	if parent != nil && parent.Size() != size {
		return fmt.Errorf("the memory has %d bytes, its parent %d", size, parent.Size())
	}
	h := header{blocks: uint64(size / BlockSize)}
	if h.blocks > 0 {
		h.runs = []run{{n: uint32(h.blocks), layer: zero}}
	}
	if parent != nil {
		h = header{blocks: parent.blocks, runs: parent.runs, layers: append([]layerRef(nil), parent.header.layers...)}
	}
	w, err := newLayer(dir)
	if err != nil {
		return err
	}
	defer w.discard()
	b := builder{w: w, source: source, layer: int32(len(h.layers)), blocks: h.blocks}
	if err := b.build(ctx); err != nil {
		return err
	}
	h.runs = overlay(h.runs, b.runs)
	h.layers = append(h.layers, w.ref) // pruned if nothing is in it
	h.prune()
	var linked []string
	defer func() {
		if err != nil {
			os.Remove(filepath.Join(dir, w.ref.fileName()))
			for _, path := range linked {
				os.Remove(path)
			}
		}
	}()
	for _, l := range h.layers {
		if l.id == w.ref.id {
			continue // is not finished yet
		}
		path, err := linkLayer(parent.layer(l), dir)
		if err != nil {
			return err
		}
		if path != "" {
			linked = append(linked, path)
		}
	}
	return finish(dir, h, w)
}

func (img *Image) layer(ref layerRef) *Layer {
	for _, l := range img.layers {
		if l.ref == ref {
			return l
		}
	}
	return nil
}

// linkLayer makes a layer a file of another directory as well, and says which if it
// was none. The parent's own link may be gone by now; the open file is not, and is
// copied then, as it is to another file system.
func linkLayer(l *Layer, dir string) (made string, err error) {
	path := filepath.Join(dir, filepath.Base(l.file.Name()))
	err = os.Link(l.file.Name(), path)
	if err == nil {
		return path, nil
	}
	if errors.Is(err, os.ErrExist) { // a layer's name says what is in it
		return "", nil
	}
	if !errors.Is(err, os.ErrNotExist) && !errors.Is(err, unix.EXDEV) && !errors.Is(err, unix.EMLINK) && !errors.Is(err, unix.EPERM) {
		return "", err
	}
	f, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if unix.IoctlFileClone(int(f.Fd()), int(l.file.Fd())) != nil {
		fi, err := l.file.Stat()
		if err != nil {
			return "", err
		}
		if _, err := io.Copy(f, io.NewSectionReader(l.file, 0, fi.Size())); err != nil {
			return "", err
		}
	}
	if err := f.Sync(); err != nil {
		return "", err
	}
	return path, os.Rename(f.Name(), path)
}

// finish makes a new layer, if anything is in it, and the header last, and puts the
// header in its place: all of that is there afterwards, or nothing.
func finish(dir string, h header, w *layerWriter) error {
	f, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.Write(h.encode()); err != nil {
		return err
	}
	if err := w.end(); err != nil {
		return err
	}
	var g errgroup.Group // the two wait for the disk together
	g.Go(w.file.Sync)
	g.Go(f.Sync)
	if err := g.Wait(); err != nil {
		return err
	}
	if w.ref.blocks > 0 {
		if err := w.name(dir); err != nil {
			return err
		}
	}
	if err := os.Rename(f.Name(), filepath.Join(dir, HeaderName)); err != nil {
		return err
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// piece is a part of the dirty memory on its way to the layer.
type piece struct {
	ranges []Range
	data   []byte
}

// builder takes what is dirty into a layer, and notes where it went.
type builder struct {
	w      *layerWriter
	source Source
	layer  int32  // what the layer is called in runs
	blocks uint64 // of the memory
	runs   []run
}

// build reads in one goroutine and writes in another.
func (b *builder) build(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	free := make(chan []byte, writePieces)
	for range writePieces {
		free <- make([]byte, writePiece)
	}
	read := make(chan piece, writePieces)
	g.Go(func() error {
		defer close(read)
		return b.read(ctx, free, read)
	})
	g.Go(func() error {
		for {
			select {
			case p, ok := <-read:
				if !ok {
					return nil
				}
				if err := b.take(p); err != nil {
					return err
				}
				free <- p.data[:writePiece] // has room for all there are
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	return g.Wait()
}

func (b *builder) read(ctx context.Context, free <-chan []byte, read chan<- piece) error {
	var p piece
	flush := func() error {
		if len(p.data) == 0 {
			return nil
		}
		if err := b.source.Read(ctx, p.data, p.ranges); err != nil {
			return err
		}
		select {
		case read <- p:
		case <-ctx.Done():
			return ctx.Err()
		}
		p = piece{}
		return nil
	}
	end := int64(0)
	for r, err := range b.source.Dirty(ctx) {
		if err != nil {
			return err
		}
		if r.Offset < end || r.Length <= 0 || r.Offset%BlockSize != 0 || r.Length%BlockSize != 0 || r.Offset+r.Length > int64(b.blocks)*BlockSize {
			return fmt.Errorf("the range of %d bytes at %d is not of this memory", r.Length, r.Offset)
		}
		end = r.Offset + r.Length
		for r.Length > 0 {
			if p.data == nil {
				select {
				case p.data = <-free:
					p.data = p.data[:0]
				case <-ctx.Done():
					return ctx.Err()
				}
			}
			n := min(r.Length, int64(writePiece-len(p.data)))
			p.ranges = append(p.ranges, Range{r.Offset, n})
			p.data = p.data[:len(p.data)+int(n)]
			r.Offset, r.Length = r.Offset+n, r.Length-n
			if len(p.data) == writePiece {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	return flush()
}

// take writes the blocks of a piece that are not zero.
func (b *builder) take(p piece) error {
	rest, kept := p.data, 0
	first := b.w.ref.blocks
	for _, r := range p.ranges {
		for block := uint32(r.Offset / BlockSize); block < uint32((r.Offset+r.Length)/BlockSize); block++ {
			data := rest[:BlockSize]
			rest = rest[BlockSize:]
			next := run{start: block, n: 1, layer: zero}
			if !isZero(data) {
				next.layer, next.at = b.layer, uint32(first)+uint32(kept/BlockSize)
				if to := p.data[kept:][:BlockSize]; &to[0] != &data[0] {
					copy(to, data)
				}
				kept += BlockSize
			}
			b.runs = appendRun(b.runs, next)
		}
	}
	_, err := b.w.append(p.data[:kept])
	return err
}

// errGone is the error for a process that is no more.
func errGone(pid int) error {
	return sandbox.Errorf(sandbox.ErrNotFound, "process %d has ended", pid)
}
