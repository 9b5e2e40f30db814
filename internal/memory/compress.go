package memory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"

	seekable "github.com/SaveTheRbtz/zstd-seekable-format-go/pkg"
	"github.com/SaveTheRbtz/zstd-seekable-format-go/pkg/framecache"
	"github.com/klauspost/compress/zstd"
)

// compressedSuffix is of a layer's file that was compressed: its content is the
// layer's file, in frames of zstd and with a table of them at the end, so that a part
// of it is read without the rest (zstd's seekable format 0.1.0).
const compressedSuffix = ".zst"

const (
	frameSize   = 64 << 10 // of a layer's file; a block is read with all of its frame
	frameMemory = 1 << 20  // that a frame may ask for
	framesKept  = 4        // decompressed, for each open layer
	worthwhile  = 0.9      // of the size: what stays larger stays as it is
)

// decoder is for all layers, and made when the first one is opened.
var decoder = sync.OnceValues(func() (*zstd.Decoder, error) {
	return zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderMaxMemory(frameMemory))
})

// CompressTo makes a second image of the same memory in the directory dir, which is
// there: a smaller one, for a time in which nobody needs it. It can be used as any
// other, and is read more slowly. Layers that further images share are linked, because
// their room is needed anyway; so is what would not become much smaller. After an
// error files of it are left in dir.
func (img *Image) CompressTo(ctx context.Context, dir string) error {
	if err := img.compressTo(ctx, dir); err != nil {
		return fmt.Errorf("compress memory image: %w", full(err))
	}
	return nil
}

func (img *Image) compressTo(ctx context.Context, dir string) error {
	for _, l := range img.layers {
		small, err := l.compressTo(ctx, dir)
		if err == nil && !small {
			_, err = linkLayer(l, dir)
		}
		if err != nil {
			return err
		}
	}
	return img.linkHeader(dir)
}

// compressTo makes a small file of a layer in dir, if it is worth it.
func (l *Layer) compressTo(ctx context.Context, dir string) (done bool, err error) {
	if l.compressed() {
		return false, nil
	}
	info, err := l.file.Stat()
	if err != nil {
		return false, err
	}
	if info.Sys().(*syscall.Stat_t).Nlink > 1 {
		return false, nil
	}
	f, err := os.CreateTemp(dir, tempPrefix)
	if err != nil {
		return false, err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := writeFrames(ctx, f, l.file, info.Size()); err != nil {
		return false, err
	}
	small, err := f.Stat()
	if err != nil {
		return false, err
	}
	if float64(small.Size()) > worthwhile*float64(info.Size()) {
		return false, nil
	}
	if err := f.Sync(); err != nil {
		return false, err
	}
	return true, os.Rename(f.Name(), filepath.Join(dir, l.ref.fileName()+compressedSuffix))
}

// writeFrames compresses the size bytes of from.
func writeFrames(ctx context.Context, to io.Writer, from io.ReaderAt, size int64) error {
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
		zstd.WithWindowSize(frameSize), zstd.WithEncoderCRC(false)) // blocks have checksums
	if err != nil {
		return err
	}
	defer encoder.Close()
	w, err := seekable.NewWriter(to, encoder)
	if err != nil {
		return err
	}
	frame := make([]byte, frameSize)
	for at := int64(0); at < size; at += frameSize {
		if err := ctx.Err(); err != nil {
			return err
		}
		frame := frame[:min(frameSize, size-at)]
		if _, err := from.ReadAt(frame, at); err != nil {
			return err
		}
		if _, err := w.Write(frame); err != nil {
			return err
		}
	}
	return w.Close()
}

// openFrames opens a compressed layer. The error is os.ErrNotExist if there is none.
func openFrames(path string) (file *os.File, content io.ReaderAt, size int64, err error) {
	f, err := os.Open(path + compressedSuffix)
	if err != nil {
		return nil, nil, 0, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	d, err := decoder()
	if err != nil {
		return nil, nil, 0, err
	}
	r, err := seekable.NewReader(f, d, seekable.WithReaderFrameCache(framecache.NewLRU(framecache.Limits{MaxFrames: framesKept})))
	if err != nil {
		return nil, nil, 0, ofContent(f.Name(), err)
	}
	table, err := r.SeekTable()
	if err != nil {
		return nil, nil, 0, err
	}
	return f, frames{r, f.Name()}, int64(table.Size()), nil
}

// framesFootprint is what the content of a compressed layer takes of memory: an entry for
// each frame, and those that are kept or being decompressed.
func framesFootprint(size int64) int64 {
	const entry = 32
	return (size/frameSize+1)*entry + (framesKept+2)*frameSize
}

// frames is the content of a compressed layer.
type frames struct {
	*seekable.Reader
	name string
}

// ReadAt implements io.ReaderAt.
func (f frames) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.Reader.ReadAt(p, off)
	if err == nil || errors.Is(err, io.EOF) {
		return n, err
	}
	return n, ofContent(f.name, err)
}

// ofContent gives an error in reading a layer's file its kind: what is not the file's is
// wrong with what is in it.
func ofContent(name string, err error) error {
	if file := new(os.PathError); errors.As(err, &file) && !errors.Is(err, syscall.EINVAL) { // that is of a place before its start
		return err
	}
	return damaged("layer %s: %v", name, err)
}
