package reserve

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

const mib = 1 << 20

// group makes what looks like a cgroup.
func group(t *testing.T, groups, name, procs, memory string) string {
	t.Helper()
	dir := filepath.Join(groups, name)
	for file, content := range map[string]string{"cgroup.procs": procs, "memory.current": memory, "cgroup.kill": ""} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func killed(t *testing.T, dir string) bool {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, "cgroup.kill"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data) == "1"
}

func TestTheLargestGroupIsKilledWhenMemoryRunsOutAndNoneBefore(t *testing.T) {
	groups := t.TempDir()
	small := group(t, groups, "1", "10\n", "1000")
	large := group(t, groups, "2", "20\n21\n", "900000")
	gone := group(t, groups, "3", "", "9000000") // its processes have ended
	if err := os.WriteFile(filepath.Join(groups, "cgroup.events"), []byte("populated 1\nfrozen 0\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		killer, err := NewOOMKiller(groups, slog.New(slog.NewTextHandler(&log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		var free atomic.Uint64
		free.Store(100 * mib)
		killer.look = func() memory { return memory{total: 512 * mib, free: free.Load(), tasks: 10} }
		ctx, stop := context.WithCancel(t.Context())
		go killer.Run(ctx)
		time.Sleep(time.Minute)
		synctest.Wait()
		if killed(t, small) || killed(t, large) {
			t.Fatal("something was killed with memory left")
		}
		free.Store(10 * mib)
		time.Sleep(late)
		synctest.Wait()
		if killed(t, small) || !killed(t, large) || killed(t, gone) {
			t.Errorf("killed: small %v, large %v, gone %v", killed(t, small), killed(t, large), killed(t, gone))
		}
		// What was killed has time to end before it is another's turn.
		group(t, groups, "2", "", "0")
		time.Sleep(exitTime / 2)
		synctest.Wait()
		if killed(t, small) {
			t.Error("the next was killed before the first had time to end")
		}
		time.Sleep(exitTime)
		stop()
		synctest.Wait()
		if !killed(t, small) {
			t.Error("with memory still short the next one stays")
		}
		if !strings.Contains(log.String(), "pid=20 processes=2") {
			t.Errorf("the log says %q", log.String())
		}
	})
}

func TestSpareMemoryCountsWhatTasksTakeUnseen(t *testing.T) {
	for _, c := range []struct {
		name  string
		state memory
		short bool
	}{
		{"plenty", memory{total: 512 * mib, free: 400 * mib, tasks: 20}, false},
		{"used up by one", memory{total: 512 * mib, free: 15 * mib, tasks: 20}, true},
		{"nearly used up by one", memory{total: 512 * mib, free: 30 * mib, tasks: 20}, false},
		{"many threads", memory{total: 512 * mib, free: 100 * mib, tasks: 200, processes: 5}, false},
		{"many processes", memory{total: 512 * mib, free: 100 * mib, tasks: 200, processes: 200}, true},
	} {
		if got := c.state.spare() < 0; got != c.short {
			t.Errorf("%s: short is %v", c.name, got)
		}
	}
}

func TestTasksAreLimitedOnlyDownwards(t *testing.T) {
	for _, c := range []struct{ before, after string }{{"max\n", "384"}, {"4000\n", "384"}, {"100\n", "100"}} {
		dir := t.TempDir()
		path := filepath.Join(dir, "pids.max")
		if err := os.WriteFile(path, []byte(c.before), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := LimitTasks(dir, 384); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(path); strings.TrimSpace(string(got)) != c.after {
			t.Errorf("a limit of %q became %q, want %s", c.before, got, c.after)
		}
	}
	if err := LimitTasks(t.TempDir(), 1); err == nil {
		t.Error("no error where there is no controller")
	}
}
