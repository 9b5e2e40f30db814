package runtimetest

// What an instance is given and is held to, and what is measured of it.

import (
	"context"
	"net/url"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/runtime"
)

func testResourcesSeen(t *testing.T, s *suite) {
	g := s.start(t)
	kib, want := g.memTotal(t), g.cfg.Resources.MemoryMiB<<10
	t.Log("MemTotal:", kib)
	if kib < want*95/100 || kib > want*105/100 {
		t.Errorf("MemTotal is %d KiB, want about %d", kib, want)
	}
}

// memTotal is how much memory the guest is shown, in KiB.
func (g *guest) memTotal(t *testing.T) int64 {
	t.Helper()
	for line := range strings.Lines(g.read(t, "/proc/meminfo")) {
		if fields := strings.Fields(line); fields[0] == "MemTotal:" {
			kib, err := strconv.ParseInt(fields[1], 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kib
		}
	}
	t.Fatal("no MemTotal in meminfo")
	return 0
}

func testDiskLimit(t *testing.T, s *suite) {
	g := s.start(t)
	if err := g.write(t.Context(), "/tmp/fits", 40, ""); err != nil {
		t.Fatalf("40 of 64 MiB cannot be written: %v", err)
	}
	if err := g.write(t.Context(), "/etc/toomuch", 40, ""); err == nil || !strings.Contains(err.Error(), "no space left") {
		t.Errorf("writing 80 of 64 MiB gives %v", err)
	}
	g.must(t, "GET", "/ping", nil, "") // and the guest lives
}

func testMemoryUsable(t *testing.T, s *suite) {
	g := s.start(t)
	g.must(t, "POST", "/alloc", url.Values{"mib": {"220"}}, "") // of 256, a kernel's own apart
	g.must(t, "GET", "/ping", nil, "")
}

func testRestoredMemoryUsable(t *testing.T, s *suite) {
	g := s.start(t, func(c *runtime.Config) { c.Resources.MemoryMiB = 512 })
	image := g.snapshot(t, runtime.ImageMemory, true)
	if err := g.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	r := s.restore(t, image, func(c *runtime.Config) { c.Resources.MemoryMiB = 512 })
	r.must(t, "POST", "/alloc", url.Values{"mib": {"460"}}, "")
	r.must(t, "GET", "/ping", nil, "")
}

func testOutOfMemory(t *testing.T, s *suite) {
	g := s.start(t)
	g.call(t.Context(), "POST", "/alloc", url.Values{"mib": {"1024"}}, "") // breaks off
	exit := awaitEnd(t, g, 30*time.Second)
	if want := "out of memory: the sandbox exceeded its limit of 256 MiB"; !exit.OutOfMemory || exit.Reason != want {
		t.Errorf("exit is %+v, want out of memory: %q", exit, want)
	}
}

func testCPULimit(t *testing.T, s *suite) {
	g := s.start(t)
	before, err := g.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	g.must(t, "POST", "/burn", url.Values{"ms": {"3000"}, "n": {"4"}}, "")
	after, err := g.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	used := (after.CPU - before.CPU).Seconds() / after.Time.Sub(before.Time).Seconds()
	t.Logf("4 busy threads took %.2f of 1 cpu", used)
	if used > 1.2 {
		t.Errorf("4 busy threads took %.2f cpus, limit 1", used)
	}
	if used < 0.3 { // less than the limit where other work needs the host
		t.Errorf("4 busy threads took only %.2f cpus: not measured", used)
	}
}

// testManyRequests is about a monitor that has each request served by a thread of its
// own, and ends when it gets no more of them.
func testManyRequests(t *testing.T, s *suite) {
	const threads = 64 // that QEMU has for a disk
	g := s.start(t, func(c *runtime.Config) { c.Resources.CPUs = 2 })
	if err := g.write(t.Context(), "/etc/big", 40, ""); err != nil {
		t.Fatal(err)
	}
	g.must(t, "POST", "/sync", nil, "")
	asked := make(chan error, 1)
	ask := func() {
		_, err := g.call(t.Context(), "POST", "/askdisk", url.Values{"path": {"/etc/big"}, "requests": {"200"}, "times": {"20"}}, "")
		asked <- err
	}
	if s.HoldDisk == nil {
		ask()
	} else {
		release := s.HoldDisk(t)
		go ask()
		g.awaitTasks(t, threads+1, time.Minute)
		release()
	}
	if err := <-asked; err != nil {
		t.Error(err)
	}
	g.must(t, "GET", "/ping", nil, "")
}

// awaitTasks waits until an instance has so many tasks on the host, or has ended.
func (g *guest) awaitTasks(t *testing.T, n int64, within time.Duration) {
	t.Helper()
	for deadline := time.After(within); ; {
		stats, err := g.Stats(t.Context())
		if err == nil && stats.PIDs >= n {
			return
		}
		select {
		case <-g.Done():
			return
		case <-deadline:
			t.Errorf("it has %d tasks (%v), and was to have %d", stats.PIDs, err, n)
			return
		case <-time.After(10 * time.Millisecond): // nothing tells of them
		}
	}
}

// testForkBomb: the instance either outlives a fork bomb or ends with a reason;
// the host stays well within the limit and another instance answers throughout.
func testForkBomb(t *testing.T, s *suite) {
	other := s.start(t)
	g := s.start(t, func(c *runtime.Config) { c.Resources.PIDs = 1024; c.Resources.MemoryMiB = 512 })
	g.call(t.Context(), "POST", "/bomb", nil, "")
	deadline := time.After(10 * time.Second)
	var most int64
	for done := false; !done; {
		select {
		case <-g.Done():
			t.Logf("ended: %+v", g.Exit())
			if g.Exit().Reason == "" {
				t.Error("ended without a reason")
			}
			done = true
		case <-deadline:
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			_, err := g.call(ctx, "GET", "/ping", nil, "")
			cancel()
			t.Logf("lives on; ping: %v", err)
			done = true
		case <-time.After(200 * time.Millisecond):
			if stats, err := g.Stats(t.Context()); err == nil {
				most = max(most, stats.PIDs)
			}
			other.must(t, "GET", "/ping", nil, "")
		}
	}
	t.Log("most tasks seen:", most)
	if most > 1024 {
		t.Errorf("%d tasks, limit 1024", most)
	}
}

func testStats(t *testing.T, s *suite) {
	g := s.start(t)
	idle, err := g.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("idle: %+v", idle)
	if idle.CPU <= 0 || idle.PIDs <= 0 || idle.MemoryBytes < 1<<20 {
		t.Errorf("idle: %+v", idle)
	}
	g.must(t, "POST", "/alloc", url.Values{"mib": {"100"}}, "")
	full, err := g.Stats(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if grown := (full.MemoryBytes - idle.MemoryBytes) >> 20; grown < 95 || grown > 160 {
		t.Errorf("100 MiB more in the guest are %d MiB on the host", grown)
	}
}
