package memory

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// bytesSource is a memory of which some blocks are said to be dirty.
type bytesSource struct {
	data  []byte
	dirty []Range
}

func (s bytesSource) Dirty(context.Context) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		for _, r := range s.dirty {
			if !yield(r, nil) {
				return
			}
		}
	}
}

func (s bytesSource) Read(_ context.Context, p []byte, ranges []Range) error {
	for _, r := range ranges {
		p = p[copy(p, s.data[r.Offset:r.Offset+r.Length]):]
	}
	return nil
}

// change makes random ranges of a memory random or zero, and says which.
func change(rnd *rand.Rand, data []byte) []Range {
	var dirty []Range
	blocks := len(data) / BlockSize
	for at := rnd.IntN(9); at < blocks; {
		n := min(1+rnd.IntN(9), blocks-at)
		for i := at; i < at+n; i++ {
			b := data[i*BlockSize:][:BlockSize]
			clear(b)
			if rnd.IntN(3) > 0 {
				b[rnd.IntN(BlockSize)] = byte(1 + rnd.IntN(255))
				b[rnd.IntN(BlockSize)] = byte(rnd.IntN(256))
			}
		}
		dirty = append(dirty, Range{int64(at) * BlockSize, int64(n) * BlockSize})
		at += n + rnd.IntN(30)
	}
	return dirty
}

func mustOpen(t *testing.T, dir string) *Image {
	t.Helper()
	img, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

func wantImage(t *testing.T, img *Image, want []byte) {
	t.Helper()
	got := make([]byte, len(want))
	if _, err := img.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the image is not the memory (%v)", err)
	}
	if err := img.Verify(t.Context()); err != nil {
		t.Error(err)
	}
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := img.CopyTo(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
		t.Fatalf("the copy is not the memory (%v)", err)
	}
}

// TestStacks writes images on images, compacts them, and compares every byte. No
// image may change when the one below it is compacted or removed.
func TestStacks(t *testing.T) {
	t.Parallel()
	for seed := range uint64(6) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		data := make([]byte, (1+rnd.IntN(700))*BlockSize)
		root := t.TempDir()
		var parent *Image
		for depth := range 12 {
			dirty := change(rnd, data)
			dir := filepath.Join(root, string(rune('a'+depth)))
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := Write(t.Context(), dir, int64(len(data)), parent, bytesSource{data, dirty}); err != nil {
				t.Fatal(err)
			}
			before := mustOpen(t, dir)
			wantImage(t, before, data)
			if rnd.IntN(3) == 0 {
				if err := Compact(t.Context(), dir); err != nil {
					t.Fatal(err)
				}
				after := mustOpen(t, dir)
				if len(after.layers) > 2 {
					t.Errorf("%d layers after it was compacted", len(after.layers))
				}
				wantImage(t, after, data)
				wantImage(t, before, data)
			}
			if depth > 0 && rnd.IntN(2) == 0 {
				os.RemoveAll(parent.dir)
			}
			parent = mustOpen(t, dir)
		}
		off := rnd.IntN(len(data))
		p := make([]byte, rnd.IntN(len(data)-off)+1)
		if _, err := parent.ReadAt(p, int64(off)); err != nil || !bytes.Equal(p, data[off:off+len(p)]) {
			t.Errorf("%d bytes at %d are not the memory's (%v)", len(p), off, err)
		}
	}
}

// TestProcessMemory takes only what was written over a private mapping of a file.
func TestProcessMemory(t *testing.T) {
	t.Parallel()
	const blocks = 300
	base := make([]byte, blocks*BlockSize)
	for i := range base {
		base[i] = byte(i/BlockSize + 1)
	}
	first := t.TempDir()
	if err := Write(t.Context(), first, int64(len(base)), nil, bytesSource{base, []Range{{0, int64(len(base))}}}); err != nil {
		t.Fatal(err)
	}
	parent := mustOpen(t, first)
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := parent.CopyTo(t.Context(), f); err != nil {
		t.Fatal(err)
	}
	mem, err := unix.Mmap(int(f.Fd()), 0, len(base), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	sum := 0
	for i := 0; i < len(mem); i += BlockSize { // reading makes no page private
		sum += int(mem[i])
	}
	mem[7*BlockSize+5], mem[8*BlockSize] = 0xee, 0xdd
	clear(mem[20*BlockSize : 22*BlockSize])
	source := ProcessMemory{PID: os.Getpid(), Segments: []Segment{
		{addressOf(mem), Range{0, 8 * BlockSize}},
		{addressOf(mem) + 8*BlockSize, Range{8 * BlockSize, (blocks - 8) * BlockSize}},
	}}
	second := t.TempDir()
	if err := Write(t.Context(), second, int64(len(mem)), parent, source); err != nil {
		t.Fatal(err)
	}
	img := mustOpen(t, second)
	wantImage(t, img, mem)
	if n := img.layers[len(img.layers)-1].ref.blocks; n != 2 || len(img.layers) != 2 {
		t.Errorf("%d blocks in the last of %d layers, want 2 in the second (%d)", n, len(img.layers), sum)
	}
}

func TestSparseFile(t *testing.T) {
	t.Parallel()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	const size = 64 * BlockSize
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, size)
	for _, at := range []int{0, 9, 10, 63} {
		copy(want[at*BlockSize:], "some bytes")
		if _, err := f.WriteAt(want[at*BlockSize:][:BlockSize], int64(at)*BlockSize); err != nil {
			t.Fatal(err)
		}
	}
	dir := t.TempDir()
	if err := Write(t.Context(), dir, size, nil, SparseFile{f, size}); err != nil {
		t.Fatal(err)
	}
	img := mustOpen(t, dir)
	wantImage(t, img, want)
	if img.Stored() != 4*BlockSize {
		t.Errorf("%d bytes stored, want those of 4 blocks", img.Stored())
	}
}

func TestDamage(t *testing.T) {
	t.Parallel()
	rnd := rand.New(rand.NewPCG(3, 3))
	data := make([]byte, 50*BlockSize)
	for i := range data {
		data[i] = byte(rnd.Uint32())
	}
	dir := t.TempDir()
	if err := Write(t.Context(), dir, int64(len(data)), nil, bytesSource{data, []Range{{0, int64(len(data))}}}); err != nil {
		t.Fatal(err)
	}
	layer := mustOpen(t, dir).layers[0].file.Name()
	for _, at := range []int64{0, 31*BlockSize + 77, 50*BlockSize + 9, 50*(BlockSize+4) + 3} {
		flip(t, layer, at)
		if err := mustOpen(t, dir).Verify(t.Context()); !errors.Is(err, ErrDamaged) {
			t.Errorf("with byte %d of the layer changed: %v", at, err)
		}
		flip(t, layer, at)
	}
	header := filepath.Join(dir, HeaderName)
	fi, err := os.Stat(header)
	if err != nil {
		t.Fatal(err)
	}
	flip(t, header, fi.Size()/2)
	if _, err := Open(dir); !errors.Is(err, ErrDamaged) {
		t.Errorf("with a byte of the header changed: %v", err)
	}
	flip(t, header, fi.Size()/2)
	if err := os.Truncate(layer, 100); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir); !errors.Is(err, ErrDamaged) {
		t.Errorf("with the layer cut off: %v", err)
	}
}

func flip(t *testing.T, path string, at int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// TestWriteCancelled leaves nothing behind.
func TestWriteCancelled(t *testing.T) {
	t.Parallel()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	dir := t.TempDir()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Write(make([]byte, 8*BlockSize)); err != nil {
		t.Fatal(err)
	}
	if err := Write(ctx, dir, 8*BlockSize, nil, SparseFile{f, 8 * BlockSize}); !errors.Is(err, context.Canceled) {
		t.Errorf("Write: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%v is left (%v)", left, err)
	}
}

func FuzzDecodeHeader(f *testing.F) {
	h := header{blocks: 9, layers: []layerRef{{id: [16]byte{1}, blocks: 5}}, runs: []run{{n: 3, layer: zero}, {start: 3, n: 5, at: 0}, {start: 8, n: 1, layer: zero}}}
	f.Add(h.encode()[:len(h.encode())-4])
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < headerFixed {
			return
		}
		h, err := decodeBody(b) // without the checksum, which keeps most out
		if err != nil {
			return
		}
		at := uint64(0)
		for _, r := range h.runs {
			if uint64(r.start) != at || r.n == 0 {
				t.Fatalf("run %+v does not start at %d", r, at)
			}
			if r.layer != zero && uint64(r.at)+uint64(r.n) > h.layers[r.layer].blocks {
				t.Fatalf("run %+v is not within its layer", r)
			}
			at = r.end()
		}
		if at != h.blocks {
			t.Fatalf("the runs end at %d of %d blocks", at, h.blocks)
		}
		again, err := decodeHeader(h.encode())
		if err != nil || len(again.runs) != len(h.runs) {
			t.Fatalf("encoded and decoded again: %v", err)
		}
	})
}
func addressOf(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }
