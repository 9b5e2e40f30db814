// Package runtimetest is the suite that every sandbox runtime passes. It works
// on real instances: the guest's init is testguest, built by the suite.
package runtimetest

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io/fs"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Harness is a runtime and what the suite needs to know of the host around it.
type Harness struct {
	Runtime runtime.Runtime

	// Reopen gives a second Runtime over the same state, as after a restart of
	// the agent.
	Reopen func(t *testing.T) runtime.Runtime

	// Slot gives a prepared network slot, taken back at the end of the test.
	Slot func(t *testing.T) *network.Slot

	// Outside gives the address of a TCP server that guests in slots reach, and
	// that sends back what it gets.
	Outside func(t *testing.T) netip.AddrPort

	// KillEngine ends, as kill -9 would, the process that is the sandbox's kernel.
	KillEngine func(t *testing.T, inst runtime.Instance)

	// BeginPause leaves the instance as an agent does that is killed in a pause,
	// before the guest is stopped.
	BeginPause func(t *testing.T, inst runtime.Instance)

	// Corrupt changes what is in an image, but no file's size.
	Corrupt func(t *testing.T, image runtime.Image)

	// Leftovers names every process, mount, cgroup and file that is on the host
	// because of this id, files in Config.Dir left out.
	Leftovers func(t *testing.T, id sandbox.ID) []string
}

type suite struct {
	Harness
	init   string
	rootfs string
}

// Run runs the suite. open is called once for each test.
func Run(t *testing.T, open func(t *testing.T) Harness) {
	dir := t.TempDir()
	init := buildGuest(t, dir)
	for _, test := range []struct {
		name string
		run  func(*testing.T, *suite)
	}{
		{"the guest runs and is reached", testGuestRuns},
		{"the guest sees the resources it was given", testResourcesSeen},
		{"two instances share a template and do not write it", testSharedRootFS},
		{"the disk limit is enforced", testDiskLimit},
		{"the guest can use nearly all its memory", testMemoryUsable},
		{"exceeding memory ends the instance with the reason", testOutOfMemory},
		{"the cpu limit is enforced", testCPULimit},
		{"a fork bomb is contained", testForkBomb},
		{"stats are those of the instance", testStats},
		{"stop can be repeated and called after the end", testStop},
		{"whose it is may be said at any time", testIdentify},
		{"the end of init is told with its status", testInitExit},
		{"a killed engine is told", testEngineKilled},
		{"an id in use is refused and its owner lives on", testConflict},
		{"a create that cannot work leaves nothing", testCreateFails},
		{"a cancelled create leaves nothing", testCreateCancelled},
		{"a second runtime adopts a running instance", testAdopt},
		{"an instance that has ended is not adopted", testAdoptEnded},
		{"an instance is discarded without its state", testDiscard},
		{"many instances come and go at once", testConcurrent},
		{"what the guest had in memory goes on from an image", testMemoryImage},
		{"a guest from an image can use nearly all its memory", testRestoredMemoryUsable},
		{"init may change the hostname and an image keeps that", testHostname},
		{"an instance goes on after its snapshot and so do its connections", testSnapshotGoesOn},
		{"connections of the image are closed in what is made of it", testConnectionsClosed},
		{"instances of one image are independent", testCopies},
		{"images of images of images work", testGenerations},
		{"a paused instance does nothing until it is resumed", testPause},
		{"a paused instance is adopted and resumed", testAdoptPaused},
		{"a snapshot whose agent is gone does not keep the instance from going on", testResumeByAnother},
		{"an instance made from an image is adopted", testAdoptRestored},
		{"a guest that has nearly all its memory in use is restored", testFullMemoryImage},
		{"a guest with many files outlives its snapshot", testManyFiles},
		{"an image of files boots anew with them", testFilesImage},
		{"a cancelled restore leaves nothing", testRestoreCancelled},
		{"a restore that cannot work leaves nothing", testRestoreFails},
		{"a damaged image is refused", testDamagedImage},
		{"an image of memory is taken as one of files or refused", testFilesOfMemory},
		{"a snapshot on a full disk is refused and the instance goes on", testDiskFull},
		{"an engine killed during a snapshot is told", testKilledDuringSnapshot},
	} {
		t.Run(test.name, func(t *testing.T) {
			test.run(t, &suite{Harness: open(t), init: init, rootfs: makeRootFS(t, t.TempDir())})
		})
	}
}

// RunFew runs the tests that between them use every path of an instance: it works, goes
// on from images and leaves nothing.
func RunFew(t *testing.T, h Harness) {
	dir := t.TempDir()
	s := &suite{Harness: h, init: buildGuest(t, dir), rootfs: makeRootFS(t, dir)}
	testGuestRuns(t, s)
	testMemoryImage(t, s)
	testFilesImage(t, s)
}

func (s *suite) checkNothingLeft(t *testing.T, cfg runtime.Config) {
	t.Helper()
	for _, left := range s.Leftovers(t, cfg.ID) {
		t.Error("left on the host:", left)
	}
	entries, err := os.ReadDir(cfg.Dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		t.Error("left in the instance's directory:", e.Name())
	}
}

func testGuestRuns(t *testing.T, s *suite) {
	g := s.start(t)
	if got, want := g.must(t, "GET", "/ping", nil, ""), "hello pid=1 host=guesthost"; got != want {
		t.Errorf("guest says %q, want %q", got, want)
	}
	if got := g.read(t, "/etc/os-release"); got != "ID=template\n" {
		t.Errorf("the template's file reads %q", got)
	}
	if got := g.read(t, "/etc/resolv.conf"); got != "nameserver 169.254.0.22\n" {
		t.Errorf("resolv.conf reads %q", got)
	}
	if got := g.read(t, "/etc/hostname"); got != "guesthost\n" {
		t.Errorf("hostname reads %q", got)
	}
	if got := g.read(t, "/etc/hosts"); !strings.Contains(got, "127.0.0.1\tlocalhost\n") || !strings.Contains(got, "169.254.0.21\tguesthost\n") {
		t.Errorf("hosts reads %q", got)
	}
	if err := g.write(t.Context(), "/etc/hosts", 0, "10.9.8.7 added\n"); err != nil {
		t.Errorf("hosts cannot be added to: %v", err)
	}
	if got := g.read(t, "/etc/hosts"); !strings.HasSuffix(got, "10.9.8.7 added\n") {
		t.Errorf("hosts reads %q after a line was added", got)
	}
	if got := g.read(t, "/proc/mounts"); strings.Contains(got, " /tmp ") {
		t.Errorf("/tmp is a mount of its own:\n%s", got)
	}
}

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

func testSharedRootFS(t *testing.T, s *suite) {
	before := digest(t, s.rootfs)
	a, b := s.start(t), s.start(t)
	if err := a.write(t.Context(), "/etc/os-release", 0, "by a\n"); err != nil {
		t.Fatal(err)
	}
	if got := a.read(t, "/etc/os-release"); got != "ID=template\nby a\n" {
		t.Errorf("a reads %q", got)
	}
	if got := b.read(t, "/etc/os-release"); got != "ID=template\n" {
		t.Errorf("b sees what a wrote: %q", got)
	}
	if after := digest(t, s.rootfs); after != before {
		t.Error("the template was changed")
	}
}

// digest sums up names, modes, times and contents below dir.
func digest(t *testing.T, dir string) [32]byte {
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(h, path, info.Mode(), info.Size(), info.ModTime())
		if d.Type().IsRegular() {
			data, err := os.ReadFile(path)
			h.Write(data)
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
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
