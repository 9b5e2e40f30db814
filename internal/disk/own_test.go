package disk

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestOwnBytesLeavesOutWhatIsShared(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount")
	}
	dir := filepath.Join(t.TempDir(), "m")
	if err := Mount(t.Context(), dir, dir+".xfs", 512<<20); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Unmount(dir, dir+".xfs"); err != nil {
			t.Error(err)
		}
	})
	const mib = 1 << 20
	src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
	check := func(path string, want int64) {
		t.Helper()
		got, err := OwnBytes(path)
		if err != nil || got < want || got > want+mib/4 {
			t.Errorf("%s has %d bytes of its own, %v; want about %d", filepath.Base(path), got, err, want)
		}
	}
	if err := os.WriteFile(src, bytes.Repeat([]byte("data"), 2*mib), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(src, 1<<30); err != nil {
		t.Fatal(err)
	}
	if err := syncFile(src); err != nil {
		t.Fatal(err)
	}
	check(src, 8*mib)
	if err := Clone(t.Context(), src, dst); err != nil {
		t.Fatal(err)
	}
	check(dst, 0)
	f, err := os.OpenFile(dst, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(bytes.Repeat([]byte("else"), mib/2), 3*mib); err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	check(dst, 2*mib)
	check(src, 2*mib)
}
