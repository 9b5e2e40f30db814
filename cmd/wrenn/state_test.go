package main

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// lockedDir is a data directory whose lock this process has, and whose lock file
// says that pid has it.
func lockedDir(t *testing.T, pid int) (dataDir, *instanceLock) {
	t.Helper()
	dir, err := openDataDir(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	lock, err := acquireLock(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(lock.release)
	if err := lock.describe(runningPlatform{PID: pid}); err != nil {
		t.Fatal(err)
	}
	return dir, lock
}

func TestAProcessThatGotTheNumberOfAnEarlierPlatformIsNotStopped(t *testing.T) {
	stranger := exec.Command("sleep", "60")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stranger.Process.Kill(); stranger.Wait() })
	dir, _ := lockedDir(t, stranger.Process.Pid) // as right after a platform took the lock
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := stopRunning(ctx, dir, syscall.SIGINT); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop: %v, want that it waits for the platform's own number", err)
	}
	var ws syscall.WaitStatus
	if pid, _ := syscall.Wait4(stranger.Process.Pid, &ws, syscall.WNOHANG, nil); pid != 0 {
		t.Error("the stranger was stopped")
	}
}

func TestAPlatformIsFoundOnceItSaysWhoItIs(t *testing.T) {
	dir, lock := lockedDir(t, 1<<22+1) // more than the kernel gives out
	if err := os.Truncate(dir.lock(), 5); err != nil {
		t.Fatal(err)
	}
	found := make(chan int, 1)
	go func() {
		r, ok, err := findRunning(t.Context(), dir)
		if err != nil || !ok {
			t.Errorf("found %v, %v", ok, err)
		}
		found <- r.PID
	}()
	select {
	case pid := <-found:
		t.Fatalf("found process %d before it said so", pid)
	case <-time.After(50 * time.Millisecond):
	}
	if err := lock.describe(runningPlatform{PID: os.Getpid()}); err != nil {
		t.Fatal(err)
	}
	if pid := <-found; pid != os.Getpid() {
		t.Errorf("found process %d", pid)
	}
}

func TestDownEndsWhatWasLeftWhateverTheDataDirectoryIsLike(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: removes namespaces and cgroups")
	}
	for name, text := range map[string]*string{
		"no lock file": nil, "an empty one": new(string), "half a one": ptr(`{"pid":`),
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := openDataDir(t.TempDir())
			if err != nil {
				t.Fatal(err)
			}
			left := filepath.Join(dir.sandboxes(), string(sandbox.NewID()))
			if err := os.MkdirAll(left, 0o700); err != nil {
				t.Fatal(err)
			}
			group := filepath.Join("/sys/fs/cgroup/pids/wrenn-"+dir.tag(), filepath.Base(left))
			process := inGroup(t, group)
			record := `{"id":"` + filepath.Base(left) + `","state":"running"}`
			if err := os.WriteFile(filepath.Join(left, "record.json"), []byte(record), 0o600); err != nil {
				t.Fatal(err)
			}
			if text != nil {
				if err := os.WriteFile(dir.lock(), []byte(*text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			var out strings.Builder
			if err := down(t.Context(), string(dir), &out); err != nil {
				t.Fatal(err)
			}
			if err := process.Wait(); err == nil {
				t.Error("the sandbox's process ended by itself")
			}
			for _, path := range []string{left, group, filepath.Dir(group)} {
				if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s is left", path)
				}
			}
		})
	}
}

func ptr(s string) *string { return &s }

// inGroup starts a process in a cgroup, as a sandbox's is.
func inGroup(t *testing.T, group string) *exec.Cmd {
	t.Helper()
	if err := os.MkdirAll(group, 0o755); err != nil {
		t.Skipf("no cgroups to test with: %v", err)
	}
	cmd := exec.Command("sh", "-c", `echo $$ > "$1"/cgroup.procs && echo in && exec sleep 60`, "sh", group)
	out := piped(t, cmd)
	t.Cleanup(func() { cmd.Process.Kill() })
	out.await("in")
	return cmd
}

func TestDownsAtTheSameTimeAllSucceed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: removes namespaces and cgroups")
	}
	dir, lock := lockedDir(t, 1<<22+1) // another down is cleaning up in a killed platform's place
	results := make(chan error, 4)
	for range cap(results) {
		go func() { results <- down(t.Context(), string(dir), new(strings.Builder)) }()
	}
	select {
	case err := <-results:
		t.Fatalf("one did not wait: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	lock.release()
	for range cap(results) {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

func TestADataDirectoryThatIsAPatternIsRefused(t *testing.T) {
	for _, name := range []string{"a*b", "a?b", "a[b", `a\b`, "a\nb", "a\xffb"} {
		if dir, err := openDataDir(filepath.Join(t.TempDir(), name)); err == nil || !strings.Contains(err.Error(), "--data") {
			t.Errorf("%q: %q, %v", name, dir, err)
		}
	}
	if _, err := openDataDir(filepath.Join(t.TempDir(), "a, b:c%d é")); err != nil {
		t.Error(err)
	}
}
