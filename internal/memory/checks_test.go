package memory

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// TestChecks checks each block once, and a layer that has changed again.
func TestChecks(t *testing.T) {
	dir := t.TempDir()
	data := make([]byte, 64*BlockSize)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(data)
	whole := []Range{{Length: int64(len(data))}}
	if err := Write(t.Context(), dir, int64(len(data)), nil, bytesSource{data, whole}); err != nil {
		t.Fatal(err)
	}
	var c Checks
	open := func() Run {
		img, err := c.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { img.Close() })
		return img.Find(0)
	}
	buf := make([]byte, len(data))
	for n := range 3 { // read and checked; the file's own; the same of another image
		r := open()
		if n == 0 {
			if _, err := r.Bytes(buf[:len(buf)/2]); err != nil {
				t.Fatal(err)
			}
		}
		part := buf[:len(buf)/2]
		got, err := r.Bytes(part)
		if err != nil || !bytes.Equal(got, data[:len(part)]) || &got[0] == &part[0] {
			t.Errorf("time %d: %v, want the file's bytes", n, err)
		}
		got, err = r.Bytes(buf[:BlockSize])
		if err != nil || !bytes.Equal(got, data[:BlockSize]) {
			t.Errorf("time %d: a block: %v", n, err)
		}
		if n > 0 {
			continue
		}
		// What was not read before is not believed.
		if got, err = r.Bytes(buf); err != nil || !bytes.Equal(got, data) || &got[0] != &buf[0] {
			t.Errorf("time %d: all: %v, want it read", n, err)
		}
	}
	layers, err := filepath.Glob(filepath.Join(dir, "*.layer"))
	if err != nil || len(layers) != 1 {
		t.Fatal(layers, err)
	}
	flip(t, layers[0], 5*BlockSize)
	if err := os.Chtimes(layers[0], time.Time{}, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, err := open().Bytes(buf); !errors.Is(err, ErrDamaged) {
		t.Errorf("a layer that has changed since: %v", err)
	}
}

// TestChecksBounded forgets layers that nobody has open, the oldest first, and no others.
func TestChecksBounded(t *testing.T) {
	var c Checks
	const blocks = keptChecks / (64*4 + 8) * 64 / 4 // four of them are what is kept
	key := func(n int) layerFile { return layerFile{id: [16]byte{byte(n)}} }
	first := c.use(key(0), blocks)
	for n := 1; n < 9; n++ {
		known := c.use(key(n), blocks)
		if c.use(key(n), blocks) != known {
			t.Fatal("a layer is not found again")
		}
		c.release([]layerFile{key(n)})
		c.release([]layerFile{key(n)})
		want := min(n, 4)
		if len(c.files) != want+1 || len(c.idle) != want || c.size != int64(want+1)*known.size() || c.Size() != known.size() || c.spare != int64(want)*known.size() {
			t.Errorf("after %d layers: %d are known, %d idle, %d bytes, %d spare", n, len(c.files), len(c.idle), c.size, c.spare)
		}
	}
	if c.use(key(0), blocks) != first {
		t.Error("a layer that is open was forgotten")
	}
	again := c.files[key(8)]
	if c.use(key(8), blocks) != again || c.spare != 3*again.size() {
		t.Errorf("a layer that is used again is spare: %d bytes", c.spare)
	}
}
