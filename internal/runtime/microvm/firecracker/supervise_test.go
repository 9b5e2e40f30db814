package firecracker_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/wrenn/wrenn/internal/memory/pager"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// ownPager has memory come from a pager that is a process of its own, as that of an
// agent is.
func ownPager(t *testing.T) firecracker.Config {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "pager.sock")
	log, err := os.Create(socket + ".log")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := pager.End(context.Background(), socket); err != nil {
			t.Error(err)
		}
		log.Close()
	})
	return firecracker.Config{PagerSocket: socket, Pager: func(ctx context.Context) (*pager.Client, error) {
		return pager.Start(ctx, socket, []string{"env", pagerEnv + "=" + socket, os.Args[0]}, log)
	}}
}

// pagersOf are the processes that serve as the pager at a socket.
func pagersOf(t *testing.T, socket string) (found []int) {
	t.Helper()
	environs, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range environs {
		env, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(env), pagerEnv+"="+socket+"\x00") {
			continue // it has ended, or is another
		}
		pid := 0
		for _, c := range filepath.Base(filepath.Dir(path)) {
			pid = 10*pid + int(c-'0')
		}
		found = append(found, pid)
	}
	return found
}

// TestPagerKilled kills the pager of a machine that runs, with an agent there and
// without one. The machine's end says why.
func TestPagerKilled(t *testing.T) {
	s := newSite(t)
	needFaultsServed(t)
	disks := t.TempDir()
	cfg := ownPager(t)
	rt := s.runtime(t, disks, cfg)
	defer func() { rt.Close() }()
	image := s.image(t, rt)
	for _, there := range []bool{true, false} {
		inst, err := rt.Restore(t.Context(), s.config(t, cloneID), image)
		if err != nil {
			t.Fatal(err)
		}
		if !there {
			if err := rt.Close(); err != nil {
				t.Fatal(err)
			}
		}
		pagers := pagersOf(t, cfg.PagerSocket)
		if len(pagers) != 1 {
			t.Fatalf("pagers: %v", pagers)
		}
		if err := syscall.Kill(pagers[0], syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		if !there {
			state := inst.State()
			rt = s.runtime(t, disks, cfg)
			inst, err = rt.Adopt(t.Context(), cloneID, state)
			if errors.Is(err, sandbox.ErrNotFound) { // ended already
				if !strings.Contains(err.Error(), "its pager was killed") {
					t.Errorf("the end is explained by %v", err)
				}
				if err := rt.Discard(t.Context(), cloneID, state); err != nil {
					t.Error(err)
				}
				continue
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		<-inst.Done()
		if why := inst.Exit().Reason; !strings.Contains(why, "its pager was killed") {
			t.Errorf("the end is explained by %q", why)
		}
		if err := inst.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// TestPagerConnections restores machines one after the other: nothing of one stays in
// the agent or in the pager.
func TestPagerConnections(t *testing.T) {
	s := newSite(t)
	needFaultsServed(t)
	cfg := ownPager(t)
	rt := s.runtime(t, t.TempDir(), cfg)
	image := s.image(t, rt)
	before := goruntime.NumGoroutine()
	const machines = 6
	for range machines {
		inst, err := rt.Restore(t.Context(), s.config(t, cloneID), image)
		if err != nil {
			t.Fatal(err)
		}
		if err := inst.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	c, err := pager.Dial(t.Context(), cfg.PagerSocket)
	if err != nil {
		t.Fatal(err)
	}
	if all, err := c.List(t.Context()); err != nil || len(all) > 0 {
		t.Errorf("the pager has %+v (%v)", all, err)
	}
	c.Close()
	// The one that is watched, and the process that is waited for.
	if now := goruntime.NumGoroutine(); now >= before+machines {
		t.Errorf("%d goroutines before %d machines, %d after", before, machines, now)
	}
	if err := rt.Close(); err != nil {
		t.Error(err)
	}
}

// TestNoPager restores a machine where no pager can be started: that says nothing about
// the image, which is not to be thrown away.
func TestNoPager(t *testing.T) {
	s := newSite(t)
	needFaultsServed(t)
	missing := filepath.Join(t.TempDir(), "wrenn")
	rt := s.runtime(t, t.TempDir(), firecracker.Config{Pager: func(ctx context.Context) (*pager.Client, error) {
		return pager.Start(ctx, filepath.Join(filepath.Dir(missing), "sock"), []string{missing}, os.Stderr)
	}})
	defer rt.Close()
	image := s.image(t, rt)
	if _, err := rt.Restore(t.Context(), s.config(t, cloneID), image); !errors.Is(err, os.ErrNotExist) || sandbox.Kind(err) != nil {
		t.Errorf("without a pager: %v (%v), want no kind", err, sandbox.Kind(err))
	}
	if err := os.Remove(filepath.Join(image.Dir, "devices")); err != nil {
		t.Fatal(err)
	}
	if _, err := rt.Restore(t.Context(), s.config(t, cloneID), image); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("without its devices: %v", err)
	}
}
