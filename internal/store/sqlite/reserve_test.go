package sqlite

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

func TestSandboxesCanBeEndedOnAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a small file system")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s, err := Open(t.Context(), filepath.Join(dir, "wrenn.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	if err := s.Teams().Insert(t.Context(), store.Team{ID: "t", Slug: "t"}); err != nil {
		t.Fatal(err)
	}
	var ids []sandbox.ID
	for range 300 {
		b := sandbox.Sandbox{ID: sandbox.NewID(), TeamID: "t", State: sandbox.Running, Created: time.Now()}
		if err := s.Sandboxes().Insert(t.Context(), b); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, b.ID)
	}
	fill(t, filepath.Join(dir, "of a sandbox"))
	for i, id := range ids {
		for _, move := range []struct{ from, to sandbox.State }{
			{sandbox.Running, sandbox.Stopping}, {sandbox.Stopping, sandbox.Stopped},
		} {
			if err := s.Sandboxes().Transition(t.Context(), id, move.from, store.Change{State: move.to, Reason: "it was killed", Ended: time.Now()}); err != nil {
				t.Fatalf("sandbox %d: %v", i, err)
			}
		}
	}
}

// fill writes to the file until the disk is full.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}

func TestADamagedDatabaseSaysWhatToDo(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wrenn.db")
	if err := os.WriteFile(path, []byte("no database, but long enough to be taken for one: "+string(make([]byte, 4096))), 0o600); err != nil {
		t.Fatal(err)
	}
	s, err := Open(t.Context(), path)
	if err == nil {
		s.Close()
		t.Fatal("opened")
	}
	if !strings.Contains(err.Error(), "backup") {
		t.Error(err)
	}
}
