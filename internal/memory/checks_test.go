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

// TestChecksBounded forgets what was seen first.
func TestChecksBounded(t *testing.T) {
	var c Checks
	file, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	const blocks = keptChecks / 4 / 4 // four of them are as much as is kept
	for n := range 9 {
		l := &Layer{ref: layerRef{id: [16]byte{byte(n)}, blocks: blocks}, file: file}
		first := c.of(l)
		if first == nil || c.of(l) != first {
			t.Fatal("a layer is not found again")
		}
		if len(c.files) != min(n+1, 4) || len(c.order) != len(c.files) || c.size != int64(len(c.files))*blocks*4 {
			t.Errorf("after %d layers: %d are known, %d bytes", n+1, len(c.files), c.size)
		}
	}
}
