package kvm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// TestDecideOnAFullDisk decides, and says the same again.
func TestDecideOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("wrenn-test", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("cannot mount: ", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	file := filepath.Join(dir, "verdict.json")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 128<<10), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	tried := 0
	try := func(context.Context) error {
		tried++
		return errors.New("no")
	}
	for range 2 {
		v, err := Decide(t.Context(), file, "monitor", "kernel", try)
		if err != nil || v.Refusal != "no" {
			t.Errorf("%+v, %v", v, err)
		}
	}
	if tried != 2 {
		t.Errorf("it was tried %d times", tried)
	}
}
