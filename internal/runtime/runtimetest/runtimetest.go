// Package runtimetest is the suite that every sandbox runtime passes. It works
// on real instances: the guest's init is testguest, built by the suite.
package runtimetest

import (
	"crypto/sha256"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

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

	// HoldDisk makes what instances write to their disks wait until it is released, at
	// the latest at the end of the test. Nil where that makes no difference.
	HoldDisk func(t *testing.T) (release func())

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
		{"many requests to the disk at once are served", testManyRequests},
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
