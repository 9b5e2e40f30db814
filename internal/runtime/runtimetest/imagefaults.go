package runtimetest

// What snapshots and restores do that cannot work, or that are cut off.

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func testRestoreCancelled(t *testing.T, s *suite) {
	g := s.start(t)
	image := g.snapshot(t, runtime.ImageMemory, true)
	restore := func(ctx context.Context, cfg runtime.Config) (runtime.Instance, error) {
		return s.Runtime.Restore(ctx, cfg, image)
	}
	s.cancelled(t, restore, 0, 5, 15, 30, 45, 60, 75, 90, 110, 130)
}

func testRestoreFails(t *testing.T, s *suite) {
	g := s.start(t)
	image := g.snapshot(t, runtime.ImageMemory, false)
	for name, change := range map[string]func(*runtime.Config){
		"no root filesystem": func(c *runtime.Config) { c.RootFS = "/nonexistent" },
		"no network":         func(c *runtime.Config) { c.Slot = &network.Slot{InnerNetNS: "/nonexistent", TAP: "tap0"} },
	} {
		cfg := s.config(t)
		bad := cfg
		change(&bad)
		if inst, err := s.Runtime.Restore(t.Context(), bad, image); err == nil {
			t.Errorf("%s: restore succeeded", name)
			inst.Stop(t.Context())
		} else if errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("%s: the image is said to be bad: %v", name, err)
		}
		s.checkNothingLeft(t, cfg)
	}
	cfg := s.config(t)
	cfg.ID = g.cfg.ID
	if _, err := s.Runtime.Restore(t.Context(), cfg, image); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("an id in use gives %v", err)
	}
	g.must(t, "GET", "/ping", nil, "")
}

// testDamagedImage damages each file of an image in each of a few ways.
func testDamagedImage(t *testing.T, s *suite) {
	g := s.start(t)
	for _, kind := range []runtime.ImageKind{runtime.ImageMemory, runtime.ImageFiles} {
		image := g.snapshot(t, kind, false)
		refused := func(what string) {
			t.Helper()
			cfg := s.config(t)
			inst, err := s.Runtime.Restore(t.Context(), cfg, image)
			if err == nil {
				inst.Stop(t.Context())
			}
			if !errors.Is(err, sandbox.ErrInvalid) {
				t.Errorf("%s: restore gives %v", what, err)
			} else {
				t.Logf("%s: %v", what, err)
			}
			s.checkNothingLeft(t, cfg)
		}
		files, err := os.ReadDir(image.Dir)
		if err != nil || len(files) == 0 {
			t.Fatal("no files in the image:", err)
		}
		for _, f := range files {
			path := filepath.Join(image.Dir, f.Name())
			whole, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for how, damaged := range map[string][]byte{
				"empty": {}, "cut off": whole[:len(whole)/2], "too long": append(whole[:len(whole):len(whole)], 0),
			} {
				if err := os.WriteFile(path, damaged, 0o600); err != nil {
					t.Fatal(err)
				}
				refused(f.Name() + " " + how)
			}
			os.Remove(path)
			refused(f.Name() + " missing")
			if err := os.WriteFile(path, whole, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if kind == runtime.ImageFiles { // the other way round it may do: see testFilesOfMemory
			image.Kind = runtime.ImageMemory
			refused("an image of the other kind")
			image.Kind = kind
		}
		s.restore(t, image) // it is whole again
	}
	for _, kind := range []runtime.ImageKind{runtime.ImageMemory, runtime.ImageFiles} {
		image := g.snapshot(t, kind, false)
		s.Corrupt(t, image)
		cfg := s.config(t)
		if inst, err := s.Runtime.Restore(t.Context(), cfg, image); err == nil {
			t.Errorf("garbage in an image of %s is taken", kind)
			inst.Stop(t.Context())
		} else if !errors.Is(err, sandbox.ErrInvalid) {
			t.Errorf("garbage in an image of %s gives %v", kind, err)
		} else {
			t.Log("garbage:", err)
		}
		s.checkNothingLeft(t, cfg)
	}
}

// testDiskFull takes snapshots into file systems of many sizes: none may be taken
// for good that is not.
func testDiskFull(t *testing.T, s *suite) {
	g := s.start(t)
	in := g.dialEcho(t)
	g.must(t, "POST", "/alloc", url.Values{"mib": {"20"}}, "")
	if err := g.write(t.Context(), "/etc/big", 20, ""); err != nil {
		t.Fatal(err)
	}
	for _, kind := range []runtime.ImageKind{runtime.ImageMemory, runtime.ImageFiles} {
		worked := 0
		for _, mib := range []int{1, 12, 24, 36, 44, 48, 52, 56, 60, 64, 68, 72, 84, 120, 240, 360} {
			dir := t.TempDir()
			if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dm", mib)); err != nil {
				t.Fatal(err)
			}
			image := runtime.Image{Dir: filepath.Join(dir, "image"), Kind: kind}
			if err := os.Mkdir(image.Dir, 0o700); err != nil {
				t.Fatal(err)
			}
			err := g.Snapshot(t.Context(), image, mib%8 == 4)
			if rerr := g.Resume(t.Context()); rerr != nil {
				t.Error(rerr)
			}
			in.check(t, fmt.Sprintf("after %d MiB: %v", mib, err))
			switch {
			case err == nil:
				worked++
				s.restore(t, image).Stop(t.Context())
			case !errors.Is(err, sandbox.ErrExhausted):
				t.Errorf("%s, %d MiB: %v", kind, mib, err)
			}
			if err := unix.Unmount(dir, 0); err != nil {
				t.Error(err)
			}
		}
		if worked == 0 {
			t.Errorf("no snapshot of %s worked", kind)
		}
	}
}

func testKilledDuringSnapshot(t *testing.T, s *suite) {
	for _, after := range []time.Duration{0, 3, 10, 20, 40} {
		g := s.start(t)
		g.must(t, "POST", "/alloc", url.Values{"mib": {"200"}}, "")
		kill := time.AfterFunc(after*time.Millisecond, func() { s.KillEngine(t, g) })
		begin := time.Now()
		err := g.Snapshot(t.Context(), runtime.Image{Dir: t.TempDir(), Kind: runtime.ImageMemory}, after%2 == 0)
		if kill.Stop() {
			t.Errorf("the snapshot was over after %v, before the kill", time.Since(begin))
			continue
		}
		if !errors.Is(err, sandbox.ErrNotFound) && !errors.Is(err, sandbox.ErrExhausted) {
			t.Errorf("killed after %v ms: %v", int(after), err)
		}
		awaitEnd(t, g, 10*time.Second)
	}
}
