package memory

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// layerFiles are the names of an image's layers.
func layerFiles(t *testing.T, dir string) (plain, small []string) {
	t.Helper()
	plain, err := filepath.Glob(filepath.Join(dir, "memory-*.layer"))
	if err != nil {
		t.Fatal(err)
	}
	if small, err = filepath.Glob(filepath.Join(dir, "memory-*.layer.zst")); err != nil {
		t.Fatal(err)
	}
	return plain, small
}

// stack writes an image of n layers and gives its directory and what it is of.
func stack(t *testing.T, rnd *rand.Rand, n int) (dir string, data []byte) {
	t.Helper()
	data = make([]byte, 700*BlockSize)
	var parent *Image
	for range n {
		dir = t.TempDir()
		dirty := change(rnd, data)
		if err := Write(t.Context(), dir, int64(len(data)), parent, bytesSource{data, dirty}); err != nil {
			t.Fatal(err)
		}
		if parent != nil {
			// Nobody else has its layers.
			if err := os.RemoveAll(parent.dir); err != nil {
				t.Fatal(err)
			}
		}
		parent = mustOpen(t, dir)
	}
	return dir, data
}

// compress makes a small image of that in dir.
func compress(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	if err := mustOpen(t, dir).CompressTo(t.Context(), to); err != nil {
		t.Fatal(err)
	}
	return to
}

func TestCompressedImages(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	dir, data := stack(t, rnd, 4)
	dir = compress(t, dir)
	if plain, small := layerFiles(t, dir); len(plain) != 0 || len(small) != 4 {
		t.Fatalf("it has the layers %v and, compressed, %v", plain, small)
	}
	img := mustOpen(t, dir)
	wantImage(t, img, data)
	var g sync.WaitGroup
	for range 4 {
		g.Go(func() {
			for range 200 {
				at := rand.IntN(len(data) - 10_000)
				got := make([]byte, 10_000)
				if _, err := img.ReadAt(got, int64(at)); err != nil || string(got) != string(data[at:][:10_000]) {
					t.Errorf("at %d are other bytes (%v)", at, err)
					return
				}
			}
		})
	}
	g.Wait()
	wantImage(t, mustOpen(t, compress(t, dir)), data)
	if _, small := layerFiles(t, dir); len(small) != 4 {
		t.Errorf("compressed once more, it has the compressed layers %v", small)
	}

	t.Run("are what zstd reads", func(t *testing.T) {
		if _, err := exec.LookPath("zstd"); err != nil {
			t.Skip("zstd is not installed (apt-get install zstd)")
		}
		_, small := layerFiles(t, dir)
		if out, err := exec.Command("zstd", "-t", small[0]).CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("are parents", func(t *testing.T) {
		next := t.TempDir()
		dirty := change(rnd, data)
		if err := Write(t.Context(), next, int64(len(data)), img, bytesSource{data, dirty}); err != nil {
			t.Fatal(err)
		}
		linked := filepath.Join(t.TempDir(), "base")
		if err := mustOpen(t, next).LinkTo(linked); err != nil {
			t.Fatal(err)
		}
		wantImage(t, mustOpen(t, linked), data)
		if err := Compact(t.Context(), linked); err != nil {
			t.Fatal(err)
		}
		if plain, small := layerFiles(t, linked); len(plain)+len(small) > 2 {
			t.Errorf("compacted, it has the layers %v and %v", plain, small)
		}
		wantImage(t, mustOpen(t, linked), data)
		wantImage(t, mustOpen(t, next), data)
	})
}

func TestSharedLayersAreNotCompressed(t *testing.T) {
	dir, data := stack(t, rand.New(rand.NewPCG(3, 4)), 1)
	other := filepath.Join(t.TempDir(), "other")
	if err := mustOpen(t, dir).LinkTo(other); err != nil {
		t.Fatal(err)
	}
	dir = compress(t, dir)
	if plain, small := layerFiles(t, dir); len(plain) != 1 || len(small) != 0 {
		t.Errorf("it has the layers %v and, compressed, %v", plain, small)
	}
	wantImage(t, mustOpen(t, dir), data)
}

func TestWhatDoesNotBecomeSmallerStays(t *testing.T) {
	data := make([]byte, 100*BlockSize)
	for i := range data {
		data[i] = byte(rand.Uint32())
	}
	dir := t.TempDir()
	if err := Write(t.Context(), dir, int64(len(data)), nil, bytesSource{data, []Range{{0, int64(len(data))}}}); err != nil {
		t.Fatal(err)
	}
	dir = compress(t, dir)
	if plain, small := layerFiles(t, dir); len(plain) != 1 || len(small) != 0 {
		t.Errorf("it has the layers %v and, compressed, %v", plain, small)
	}
}

func TestInterruptedCompression(t *testing.T) {
	dir, data := stack(t, rand.New(rand.NewPCG(5, 6)), 3)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	to := t.TempDir()
	if err := mustOpen(t, dir).CompressTo(ctx, to); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled, it says %v", err)
	}
	if _, err := Open(to); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what it left opens: %v", err)
	}
	wantImage(t, mustOpen(t, dir), data)
}

func TestDamagedFrames(t *testing.T) {
	dir, data := stack(t, rand.New(rand.NewPCG(7, 8)), 1)
	dir = compress(t, dir)
	_, small := layerFiles(t, dir)
	whole, err := os.ReadFile(small[0])
	if err != nil {
		t.Fatal(err)
	}
	read := func(bytes []byte) error {
		if err := os.WriteFile(small[0], bytes, 0o600); err != nil {
			t.Fatal(err)
		}
		img, err := Open(dir)
		if err != nil {
			return err
		}
		defer img.Close()
		_, err = img.ReadAt(make([]byte, len(data)), 0)
		return err
	}
	rnd := rand.New(rand.NewPCG(9, 10))
	for range 300 {
		bytes := append([]byte(nil), whole...)
		at := rnd.IntN(len(bytes))
		bytes[at] ^= byte(1 << rnd.IntN(8))
		img := read(bytes)
		if img == nil { // the bit may be one that nothing depends on; the bytes are right
			got := make([]byte, len(data))
			if _, err := mustOpen(t, dir).ReadAt(got, 0); err != nil || string(got) != string(data) {
				t.Fatalf("with bit changed at %d other bytes are read (%v)", at, err)
			}
		} else if !errors.Is(img, ErrDamaged) {
			t.Fatalf("with a bit changed at %d: %v", at, img)
		}
	}
	for _, n := range []int{0, 1, 16, len(whole) / 2, len(whole) - 1} {
		if err := read(whole[:n]); !errors.Is(err, ErrDamaged) {
			t.Errorf("cut off at %d: %v", n, err)
		}
	}
}

func TestCompressionOnAFullDisk(t *testing.T) {
	small := t.TempDir()
	if err := unix.Mount("none", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Skip("cannot mount a small file system: ", err)
	}
	t.Cleanup(func() { unix.Unmount(small, unix.MNT_DETACH) })
	rnd := rand.New(rand.NewPCG(11, 12))
	data := make([]byte, 150*BlockSize)
	for i := range data {
		data[i] = byte(rnd.IntN(32)) // becomes smaller, but not small
	}
	dir := filepath.Join(small, "image")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := Write(t.Context(), dir, int64(len(data)), nil, bytesSource{data, []Range{{0, int64(len(data))}}}); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(small, "filler"), make([]byte, 300<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(small, "small")
	if err := os.Mkdir(to, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := mustOpen(t, dir).CompressTo(t.Context(), to); !errors.Is(err, sandbox.ErrExhausted) {
		t.Errorf("on a full disk: %v", err)
	}
	wantImage(t, mustOpen(t, dir), data)
}
