package metrics

import (
	"math"
	"os"
	"testing"
	"time"
)

func TestUsageCountsOneBusyCPUAsHundred(t *testing.T) {
	var m Meter
	at := time.Unix(100, 0)
	if got := m.usage(10*time.Second, at); got != 0 {
		t.Errorf("the first measurement has nothing to compare with: got %v", got)
	}
	if got := m.usage(12*time.Second, at.Add(time.Second)); got != 200 {
		t.Errorf("two CPUs busy: got %v", got)
	}
	if got := m.usage(0, at.Add(2*time.Second)); got != 0 {
		t.Errorf("a counter that went back: got %v", got)
	}
}

func TestBusyTimeReadsWhatIsThere(t *testing.T) {
	for stat, want := range map[string]time.Duration{
		"cpu  100 10 50 9000 70 5 5 30 0 0\ncpu0 1": 1700 * time.Millisecond,
		"cpu  0 0 0 0 0 0 0 0\n":                    0,
		"cpu 100 0 100 7":                           2 * time.Second,
		"":                                          0,
		"intr 5":                                    0,
		"cpu a b c d e":                             0,
	} {
		if got := busyTime([]byte(stat)); got != want {
			t.Errorf("%q: got %v, want %v", stat, got, want)
		}
	}
}

func TestMeminfo(t *testing.T) {
	got := parseMeminfo([]byte("MemTotal:  8 kB\nHugePages_Total: 3\nbroken\nX: y kB\n"))
	if got["MemTotal"] != 8192 || got["HugePages_Total"] != 3 || len(got) != 2 {
		t.Errorf("got %v", got)
	}
}

func TestAMemoryLimitOfACgroupIsFound(t *testing.T) {
	for name, tc := range map[string]struct {
		files              map[string]string
		limit, used, cache uint64
		ok                 bool
	}{
		"version 2":            {map[string]string{"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 1\ninactive_file 200\n"}, 1000, 500, 200, true},
		"version 1":            {map[string]string{"memory/memory.limit_in_bytes": "1000\n", "memory/memory.usage_in_bytes": "700\n", "memory/memory.stat": "inactive_file 1\ntotal_inactive_file 200\n"}, 1000, 500, 200, true},
		"no limit":             {map[string]string{"memory.max": "max\n"}, 0, 0, 0, false},
		"none":                 {nil, 0, 0, 0, false},
		"more cache than used": {map[string]string{"memory.max": "9", "memory.current": "5", "memory.stat": "inactive_file 7"}, 9, 0, 5, true},
	} {
		dir := t.TempDir()
		os.Mkdir(dir+"/memory", 0o755)
		for file, content := range tc.files {
			os.WriteFile(dir+"/"+file, []byte(content), 0o644)
		}
		limit, used, cache, ok := readCgroup(dir)
		if ok != tc.ok || (ok && (limit != tc.limit || used != tc.used || cache != tc.cache)) {
			t.Errorf("%s: got %d, %d, %d, %v", name, limit, used, cache, ok)
		}
	}
}

func FuzzProcFiles(f *testing.F) {
	f.Add([]byte("cpu  100 10 50 9000 70 5 5 30 0 0\n"), []byte("MemTotal: 8 kB\n"))
	f.Add([]byte("cpu 18446744073709551615 1 1 1 1"), []byte("MemTotal: 18446744073709551615 kB\nMemTotal:\n"))
	f.Fuzz(func(t *testing.T, stat, info []byte) {
		busy := busyTime(stat)
		if busy < 0 {
			t.Errorf("%q: busy for %v", stat, busy)
		}
		m := Meter{lastTime: time.Unix(0, 0)}
		if pct := m.usage(busy, time.Unix(1, 0)); pct < 0 || math.IsNaN(pct) || math.IsInf(pct, 0) {
			t.Errorf("%q: %v %%", stat, pct)
		}
		availableMemory(parseMeminfo(info))
	})
}
