package gvisor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestInstallCopiesOnceAndFollowsTheBinary(t *testing.T) {
	dir, binary := filepath.Join(t.TempDir(), "bin"), filepath.Join(t.TempDir(), "wrenn")
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	install := func() string {
		t.Helper()
		path, err := installBinary(dir, binary)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.HasPrefix(filepath.Base(path), "runsc-") {
			t.Errorf("installed as %s: would not be run as runsc", path)
		}
		return path
	}
	read := func(path string) string {
		t.Helper()
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}

	write(binary, "first build")
	first := install()
	if got := read(first); got != "first build" {
		t.Fatalf("copy holds %q", got)
	}
	before, err := os.Stat(first)
	if err != nil {
		t.Fatal(err)
	}
	if again := install(); again != first {
		t.Errorf("second install gives %s, first gave %s", again, first)
	}

	os.Remove(binary) // as a linker does; a write in place would change the inode's time
	write(binary, "second build")
	second := install()
	if second == first || read(second) != "second build" {
		t.Errorf("a new build is installed as %s with %q", second, read(second))
	}
	if got := read(first); got != "first build" {
		t.Errorf("the copy that sandboxes run from now holds %q", got)
	}

	// Going back to a build that is installed gives its copy, untouched.
	os.Remove(binary)
	write(binary, "first build")
	if back := install(); back != first {
		t.Errorf("the first build again gives %s, want %s", back, first)
	}
	if after, err := os.Stat(first); err != nil || !os.SameFile(before, after) {
		t.Error("a copy in use was replaced by an equal one")
	}

	// A copy that was cut off, or is gone, is made again.
	if err := os.Truncate(first, 3); err != nil {
		t.Fatal(err)
	}
	if got := read(install()); got != "first build" {
		t.Errorf("after the copy was cut off it holds %q", got)
	}
	os.Remove(first)
	if got := read(install()); got != "first build" {
		t.Errorf("after the copy was removed it holds %q", got)
	}
	left, _ := filepath.Glob(filepath.Join(dir, ".runsc-*"))
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestInstallOfTheRunningBinaryIsQuickTheSecondTime(t *testing.T) {
	dir := t.TempDir()
	first, err := InstallBinary(dir)
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	second, err := InstallBinary(dir)
	if err != nil || second != first {
		t.Fatalf("second install: %s, %v; first: %s", second, err, first)
	}
	if d := time.Since(start); d > 20*time.Millisecond {
		t.Errorf("second install took %v", d)
	}
}
