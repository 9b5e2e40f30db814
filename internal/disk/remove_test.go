package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRemoveAll removes what is deeper than there are descriptors, and wide, and leaves
// alone what links point at.
func TestRemoveAll(t *testing.T) {
	dir := t.TempDir()
	kept := filepath.Join(dir, "kept")
	if err := errors.Join(os.Mkdir(kept, 0o700), os.WriteFile(filepath.Join(kept, "file"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "path")
	if err := os.Mkdir(path, 0o700); err != nil {
		t.Fatal(err)
	}
	at, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 3000 {
		for i := range n % 3 {
			if err := errors.Join(unix.Mkdirat(at, fmt.Sprint("up", n+i), 0o700), unix.Symlinkat(kept, at, fmt.Sprint("link", i))); err != nil {
				t.Fatal(err)
			}
		}
		if err := unix.Mkdirat(at, "d", 0); err != nil {
			t.Fatal(err)
		}
		below, err := unix.Openat(at, "d", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Skip("only root opens what nobody may: ", err)
		}
		unix.Close(at)
		at = below
	}
	unix.Close(at)
	for i := range 3000 {
		if err := os.WriteFile(filepath.Join(path, fmt.Sprint("file", i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	free, err := unix.Dup(1)
	if err != nil {
		t.Fatal(err)
	}
	unix.Close(free)
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(free) + 8, Max: was.Max}); err != nil {
		t.Fatal(err)
	}
	err = RemoveAll(path)
	if back := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); back != nil {
		t.Fatal(back)
	}
	if err != nil {
		t.Fatal(err)
	}
	onlyFiles(t, dir, "kept")
	onlyFiles(t, kept, "file")
	if err := RemoveAll(path); err != nil {
		t.Errorf("what is not there: %v", err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(kept, link); err != nil {
		t.Fatal(err)
	}
	if err := RemoveAll(link); err != nil {
		t.Error(err)
	}
	onlyFiles(t, kept, "file")
	onlyFiles(t, dir, "kept")
}
