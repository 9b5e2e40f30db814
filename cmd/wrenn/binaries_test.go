package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
)

func TestCopiesOfEarlierBuildsGoWhenNoSandboxUsesThem(t *testing.T) {
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(sleep)
	if err != nil {
		t.Fatal(err)
	}
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	bin := filepath.Join(dir, "bin")
	write := func(path string, data []byte) string {
		t.Helper()
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	now := write(filepath.Join(bin, "runsc-now"), nil)
	running := write(filepath.Join(bin, "runsc-running"), program)
	write(filepath.Join(bin, "runsc-old"), nil)
	write(filepath.Join(bin, "runsc.json"), nil)
	write(filepath.Join(bin, "envd-old"), nil)
	mounted := write(filepath.Join(bin, "envd-mounted"), nil)
	write(filepath.Join(dir, "instances", "a", "config.json"), []byte(`{"mounts":[{"source":"`+mounted+`"}]}`))
	write(filepath.Join(bin, "envd-paused"), nil)
	write(filepath.Join(dir, "sandboxes", "a", "image", "manifest.json"), []byte(`{"guest_init":"envd-paused"}`))
	write(filepath.Join(bin, "envd-snapshot"), nil)
	write(filepath.Join(dir, "images", "a", "manifest.json"), []byte(`{"guest_init":"envd-snapshot"}`))
	write(filepath.Join(bin, "envd-machine"), nil)
	write(filepath.Join(dir, "sandboxes", "b", "record.json"), []byte(`{"guest_init":"envd-machine"}`))
	if err := os.Mkdir(filepath.Join(dir, "instances", "b"), 0o755); err != nil { // one that is being made
		t.Fatal(err)
	}
	cmd := exec.Command(running, "60")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })

	if err := removeStaleBinaries(bin, dir, now); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(bin)
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	for _, e := range entries {
		left = append(left, e.Name())
	}
	if want := []string{"envd-machine", "envd-mounted", "envd-paused", "envd-snapshot", "runsc-now", "runsc-running", "runsc.json"}; !slices.Equal(left, want) {
		t.Errorf("left %v, want %v", left, want)
	}
}

func TestALogThatHasGrownLargeIsSetAsideAtAStart(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log", "wrenn.log")
	for _, size := range []int64{0, maxLogSize - 4, maxLogSize + 1} {
		f, err := openLog(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteString("more"); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
	}
	f, err := openLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || fi.Size() != 0 {
		t.Errorf("the new log has %d bytes, %v", fi.Size(), err)
	}
	if fi, err := os.Stat(path + ".1"); err != nil || fi.Size() != maxLogSize+1 {
		t.Errorf("the old log: %v, %v", fi, err)
	}
}
