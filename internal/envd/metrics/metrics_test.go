package metrics

import (
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
