// Package memory keeps memory images of virtual machines. An image is a header,
// which says of every block of 4 KiB in which layer it is or that it is zero, and
// the layers, files that never change. An image lies in one directory with all its
// layers; images that share a layer hold hard links to it.
//
// docs/memory-images.md has the format.
package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"sort"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// BlockSize is the unit in which images are kept.
const BlockSize = 4096

// HeaderName is the file of an image's directory that says what is in it.
const HeaderName = "memory"

// ErrDamaged is the error of images and layers whose bytes are not those that
// were written.
var ErrDamaged = errors.New("memory image is damaged")

// Image is an image that is open. It may be used from several goroutines at once.
type Image struct {
	header
	dir    string
	layers []*Layer // of header.layers
	closed func()   // nil, or what is to be done at Close
}

// Run is a range of an image. The bytes are at At of Layer, and zero without one.
type Run struct {
	Offset, Length int64
	Layer          *Layer
	At             int64
}

// Open opens the image that lies in dir. An image that is compacted meanwhile is
// opened as it was before or as it is after.
func Open(dir string) (*Image, error) {
	const tries = 8 // a compaction takes longer than to open
	var err error
	for range tries {
		var img *Image
		if img, err = open(dir); err == nil {
			return img, nil
		}
		if !errors.Is(err, os.ErrNotExist) {
			break
		}
	}
	return nil, fmt.Errorf("open memory image: %w", err)
}

func open(dir string) (_ *Image, err error) {
	data, err := os.ReadFile(filepath.Join(dir, HeaderName))
	if err != nil {
		return nil, err
	}
	img := &Image{dir: dir}
	if img.header, err = decodeHeader(data); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			img.Close()
		}
	}()
	for _, ref := range img.header.layers {
		l, err := openLayer(filepath.Join(dir, ref.fileName()), ref)
		if err != nil {
			return nil, err
		}
		img.layers = append(img.layers, l)
	}
	return img, nil
}

// Close closes the layers.
func (img *Image) Close() error {
	for _, l := range img.layers {
		l.close()
	}
	if img.closed != nil {
		img.closed()
	}
	return nil
}

// Footprint is how many bytes of this program's memory the open image takes, without
// what Checks remembers.
func (img *Image) Footprint() int64 {
	n := int64(len(img.runs)) * int64(unsafe.Sizeof(run{}))
	for _, l := range img.layers {
		n += l.footprint()
	}
	return n
}

// Size is the size of the memory, in bytes.
func (img *Image) Size() int64 { return int64(img.blocks) * BlockSize }

// Stored is how many bytes of the memory are not zero, in whole blocks.
func (img *Image) Stored() int64 {
	var n int64
	for _, r := range img.runs {
		if r.layer != zero {
			n += int64(r.n) * BlockSize
		}
	}
	return n
}

// Layers are the layers that the image has bytes of, oldest first.
func (img *Image) Layers() []*Layer { return slices.Clone(img.layers) }

// Runs gives the whole image in order.
func (img *Image) Runs() iter.Seq[Run] {
	return func(yield func(Run) bool) {
		for _, r := range img.runs {
			if !yield(img.run(r)) {
				return
			}
		}
	}
}

func (img *Image) run(r run) Run {
	out := Run{Offset: int64(r.start) * BlockSize, Length: int64(r.n) * BlockSize}
	if r.layer != zero {
		out.Layer, out.At = img.layers[r.layer], int64(r.at)*BlockSize
	}
	return out
}

// Find gives what is left of the run that holds offset, from its block on. The
// offset is below Size.
func (img *Image) Find(offset int64) Run {
	block := uint32(offset / BlockSize)
	i := sort.Search(len(img.runs), func(i int) bool { return img.runs[i].start > block }) - 1
	return img.run(img.runs[i].from(block))
}

// ReadAt implements io.ReaderAt, and checks what it reads.
func (img *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("read memory image: negative offset")
	}
	done := 0
	var block [BlockSize]byte
	for done < len(p) {
		at := off + int64(done)
		if at >= img.Size() {
			return done, io.EOF
		}
		r := img.Find(at)
		skip := at % BlockSize
		if n := min(r.Length, int64(len(p)-done)) / BlockSize * BlockSize; skip == 0 && n > 0 {
			if err := r.read(p[done:][:n]); err != nil {
				return done, err
			}
			done += int(n)
			continue
		}
		if err := r.read(block[:]); err != nil {
			return done, err
		}
		done += copy(p[done:], block[skip:])
	}
	return done, nil
}

// read fills p, of whole blocks, from the run's start.
func (r Run) read(p []byte) error {
	if r.Layer == nil {
		clear(p)
		return nil
	}
	return r.Layer.read(p, r.At)
}

// Verify reads all that the image has and checks it.
func (img *Image) Verify(ctx context.Context) error {
	buf := make([]byte, copyPiece)
	for r := range img.Runs() {
		for r.Layer != nil && r.Length > 0 {
			if err := ctx.Err(); err != nil {
				return err
			}
			p := buf[:min(r.Length, copyPiece)]
			if err := r.read(p); err != nil {
				return err
			}
			r.At += int64(len(p))
			r.Length -= int64(len(p))
		}
	}
	return nil
}

// full gives an error of a full disk its kind.
func full(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return &sandbox.Error{Kind: sandbox.ErrExhausted, Message: "the host's disk is full", Cause: err}
	}
	return err
}

// Cached says whether the first block is in memory already, as one that is zero is.
func (r Run) Cached() bool { return r.Layer == nil || r.Layer.cached(r.At) }

// Read fills p, of whole blocks and no longer than the run, from the start of the run,
// which has a layer. What was not found good before is checked.
func (r Run) Read(p []byte) error { return r.Layer.readOnce(p, r.At) }

// Bytes gives as many bytes of the run as p has, from its start and checked. The run has
// a layer, and p is of whole blocks and no longer than the run. The bytes are in p, or
// somewhere as long as the image is open: they are for a system call, which fails where
// reading them could end the program.
func (r Run) Bytes(p []byte) ([]byte, error) { return r.Layer.bytes(p, r.At) }
