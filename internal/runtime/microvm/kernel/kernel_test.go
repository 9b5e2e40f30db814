package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestUnpackingGivesTheKernelThatWasPacked(t *testing.T) {
	kernel := []byte("\x7fELF")
	for i := range 3 << 20 { // more than one block for some
		kernel = append(kernel, byte(rand.Intn(2)*i))
	}
	size := binary.LittleEndian.AppendUint32(nil, uint32(len(kernel)))
	for name, payload := range map[string][]byte{
		"lz4": append(packLZ4(t, kernel), size...),
		"gz":  packGzip(t, kernel), // has the size itself
		"zst": append(packZstd(t, kernel), size...),
		"xz":  append(packXZ(t, kernel), size...),
	} {
		t.Run(name, func(t *testing.T) {
			image := bzImage(payload)
			got, err := uncompress(t.Context(), image)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, kernel) {
				t.Errorf("got %d bytes, want the %d that were packed", len(got), len(kernel))
			}
			for _, cut := range []int{0, 1, 0x205, 0x250, 1024, len(image) / 2, len(image) - 1} {
				if _, err := uncompress(t.Context(), image[:cut]); err == nil {
					t.Errorf("an image cut to %d of %d bytes was unpacked", cut, len(image))
				}
			}
		})
	}
	if got, err := uncompress(t.Context(), kernel); err != nil || !bytes.Equal(got, kernel) {
		t.Errorf("an ELF kernel: %v", err)
	}
}

// bzImage puts the payload where the header of such an image says it is.
func bzImage(payload []byte) []byte {
	const setup, offset = 2, 0x40
	image := make([]byte, (setup+1)*512+offset, (setup+1)*512+offset+len(payload))
	image[0x1f1] = setup
	copy(image[0x202:], "HdrS\x0f\x02")
	binary.LittleEndian.PutUint32(image[0x248:], offset)
	binary.LittleEndian.PutUint32(image[0x24c:], uint32(len(payload)))
	return append(image, payload...)
}

func packLZ4(t *testing.T, data []byte) []byte {
	t.Helper()
	out := []byte{0x02, 0x21, 0x4c, 0x18}
	for block := range slices.Chunk(data, 8<<20) {
		packed := make([]byte, lz4.CompressBlockBound(len(block)))
		n, err := lz4.CompressBlock(block, packed, nil)
		if err != nil {
			t.Fatal(err)
		}
		out = binary.LittleEndian.AppendUint32(out, uint32(n))
		out = append(out, packed[:n]...)
	}
	return out
}

func packGzip(t *testing.T, data []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	_, err := w.Write(data)
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func packZstd(t *testing.T, data []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(data, nil)
}

func packXZ(t *testing.T, data []byte) []byte {
	t.Helper()
	cmd := exec.Command("xz", "--check=crc32", "--x86", "--lzma2=dict=1MiB", "-c") // as kernels do it
	cmd.Stdin = bytes.NewReader(data)
	out, err := cmd.Output()
	if err != nil {
		t.Skip("xz: ", err)
	}
	return out
}

func TestModulesComeAfterWhatTheyNeed(t *testing.T) {
	k := testKernel(t)
	if !slices.Contains(k.Modules, "virtio_blk.ko") {
		t.Errorf("there is no driver for disks among %v", k.Modules)
	}
	for i, file := range k.Modules {
		data, err := os.ReadFile(filepath.Join(filepath.Dir(k.Vmlinux), modulesName, file))
		if err != nil {
			t.Fatal(err)
		}
		needs, err := dependencies(data)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range needs {
			if !slices.Contains(k.Modules[:i], name+".ko") {
				t.Errorf("%s needs %s, which does not come before it in %v", file, name, k.Modules)
			}
		}
	}
}

func TestAnOwnKernelIsInstalledOnceAndWhole(t *testing.T) {
	k := testKernel(t)
	dir := t.TempDir()
	if _, err := Load(dir); !errors.Is(err, sandbox.ErrNotFound) || !strings.Contains(err.Error(), "wrenn kernel install") {
		t.Errorf("Load of nothing: %v", err)
	}
	// As left by one that was killed.
	if err := os.MkdirAll(filepath.Join(dir, ".tmp-1", "kernel"), 0o755); err != nil {
		t.Fatal(err)
	}
	opts := Options{Vmlinux: k.Vmlinuz, Modules: filepath.Join(filepath.Dir(k.Vmlinux), modulesName)}
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			got, err := Install(t.Context(), dir, opts)
			if err != nil {
				t.Error(err)
				return
			}
			if got.Name != k.Name || got.Version != k.Version || got.PVH != k.PVH || !slices.Equal(got.Modules, k.Modules) {
				t.Errorf("installed %+v, want the like of %+v", got, k)
			}
		})
	}
	group.Wait()
	entries, err := filepath.Glob(filepath.Join(dir, "*"))
	if err != nil || len(entries) != 3 {
		t.Errorf("there is %v (%v), want one kernel, the link and the lock", entries, err)
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".tmp-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	got, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, pair := range [][2]string{{got.Vmlinux, k.Vmlinux}, {got.Vmlinuz, k.Vmlinuz}, {got.Initramfs, k.Initramfs}} {
		a, err := os.ReadFile(pair[0])
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(pair[1])
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s differs from %s", pair[0], pair[1])
		}
	}
}

func TestTheInitramfsIsMadeAgainForAnotherBuild(t *testing.T) {
	k := testKernel(t)
	dir := t.TempDir()
	first, err := Install(t.Context(), dir, Options{Vmlinux: k.Vmlinux})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(first.Initramfs); err != nil {
		t.Fatal(err)
	}
	again, err := Load(dir)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(again.Initramfs); err != nil {
		t.Error(err)
	}
}

func TestTheKernelInstalledLastIsTheCurrentOne(t *testing.T) {
	k := testKernel(t)
	dir := t.TempDir()
	vmlinux, err := os.ReadFile(k.Vmlinux)
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other")
	// Another kernel to all who look at it: one byte behind its end more.
	if err := os.WriteFile(other, append(vmlinux, 0), 0o600); err != nil {
		t.Fatal(err)
	}
	var last string
	for _, path := range []string{k.Vmlinux, other, k.Vmlinux} {
		installed, err := Install(t.Context(), dir, Options{Vmlinux: path})
		if err != nil {
			t.Fatal(err)
		}
		current, err := Load(dir)
		if err != nil || current.Name != installed.Name {
			t.Errorf("current is %s (%v), want %s", current.Name, err, installed.Name)
		}
		last = installed.Name
	}
	kernels, err := List(dir)
	if err != nil || len(kernels) != 2 {
		t.Fatalf("List: %v, %v", kernels, err)
	}
	for _, l := range kernels {
		if l.Current != (l.Name == last) {
			t.Errorf("%s is current: %v", l.Name, l.Current)
		}
	}
}

func TestWhatIsNoKernelIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, text := range []string{"", "no kernel", "\x7fELF but no more"} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if _, err := Install(t.Context(), dir, Options{Vmlinux: path}); !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("Install of %q: %v", text, err)
		}
		if _, err := Load(dir); !errors.Is(err, sandbox.ErrNotFound) {
			t.Errorf("Load after it: %v", err)
		}
	}
	if _, err := Install(t.Context(), t.TempDir(), Options{Modules: "/lib/modules"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("modules without a kernel: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Install(ctx, t.TempDir(), Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Install after its end: %v", err)
	}
}
