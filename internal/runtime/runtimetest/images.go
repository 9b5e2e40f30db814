package runtimetest

// What images of memory keep, and what becomes of copies.

import (
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/runtime"
)

func testMemoryImage(t *testing.T, s *suite) {
	g := s.start(t)
	g.must(t, "POST", "/side", nil, "")
	g.count(t)
	g.count(t)
	g.must(t, "POST", "/hold", url.Values{"path": {"/tmp/held"}}, "")
	g.must(t, "POST", "/held", nil, "before\n")
	g.must(t, "POST", "/file", url.Values{"op": {"remove"}, "path": {"/tmp/held"}}, "") // has no name any more
	g.must(t, "POST", "/terminal", nil, "")
	g.must(t, "POST", "/type", url.Values{"line": {"a"}}, "")
	if err := g.write(t.Context(), "/etc/os-release", 0, "and mine\n"); err != nil {
		t.Fatal(err)
	}
	if err := g.write(t.Context(), "/dev/shm/shared", 1, ""); err != nil {
		t.Fatal(err)
	}
	ticks, total := g.number(t, "/ticks"), g.memTotal(t)
	image := g.snapshot(t, runtime.ImageMemory, true)
	if err := g.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}

	begin := time.Now()
	r := s.restore(t, image, func(c *runtime.Config) { c.Hostname = "another" })
	t.Log("restore until the first answer took", time.Since(begin))
	if got, want := r.must(t, "GET", "/ping", nil, ""), "hello pid=1 host=another"; got != want {
		t.Errorf("guest says %q, want %q", got, want)
	}
	if got := r.count(t); got != 3 {
		t.Errorf("the child process was asked %d times, want 3", got)
	}
	if got := r.must(t, "POST", "/held", nil, "after\n"); got != "before\nafter\n" {
		t.Errorf("the open file reads %q", got)
	}
	if got := r.must(t, "POST", "/type", url.Values{"line": {"b"}}, ""); !strings.Contains(got, `line 2 is "b"`) {
		t.Errorf("the terminal shows %q", got)
	}
	if got := r.read(t, "/etc/os-release"); got != "ID=template\nand mine\n" {
		t.Errorf("the changed file reads %q", got)
	}
	if got := r.must(t, "GET", "/stat", url.Values{"path": {"/dev/shm/shared"}}, ""); got == "gone" {
		t.Error("the file in memory is gone")
	}
	if got := r.number(t, "/ticks"); got < ticks {
		t.Errorf("the clock shows %d, before %d", got, ticks)
	}
	if got := r.memTotal(t); got != total {
		t.Errorf("the restored guest is shown %d KiB of memory, before %d", got, total)
	}
}

func testHostname(t *testing.T, s *suite) {
	g := s.start(t)
	g.must(t, "POST", "/hostname", url.Values{"name": {"renamed"}}, "")
	for _, g := range []*guest{g, s.restore(t, g.snapshot(t, runtime.ImageMemory, false))} {
		if got := g.must(t, "GET", "/ping", nil, ""); got != "hello pid=1 host=renamed" {
			t.Errorf("guest says %q", got)
		}
		if got := g.read(t, "/proc/sys/kernel/hostname"); got != "renamed\n" {
			t.Errorf("the kernel says %q", got)
		}
	}
}

func testCopies(t *testing.T, s *suite) {
	g := s.start(t)
	g.must(t, "POST", "/side", nil, "")
	g.count(t)
	image := g.snapshot(t, runtime.ImageMemory, false)
	copies := make([]*guest, 3)
	cfgs := make([]runtime.Config, len(copies))
	insts := make([]runtime.Instance, len(copies))
	errs := make([]error, len(copies))
	for i := range cfgs {
		cfgs[i] = s.config(t)
	}
	var wg sync.WaitGroup
	for i := range copies {
		wg.Go(func() { insts[i], errs[i] = s.Runtime.Restore(t.Context(), cfgs[i], image) })
	}
	wg.Wait()
	for i := range copies {
		copies[i] = s.started(t, cfgs[i], insts[i], errs[i])
		copies[i].resumed(t, image)
	}
	for i, c := range append(copies, g) {
		for range i {
			c.count(t)
		}
		if err := c.write(t.Context(), "/etc/os-release", 0, fmt.Sprintf("by %d\n", i)); err != nil {
			t.Fatal(err)
		}
	}
	for i, c := range append(copies, g) {
		if got := c.count(t); got != i+2 {
			t.Errorf("%d: asked %d times, want %d", i, got, i+2)
		}
		if got, want := c.read(t, "/etc/os-release"), fmt.Sprintf("ID=template\nby %d\n", i); got != want {
			t.Errorf("%d: reads %q, want %q", i, got, want)
		}
	}
}

func testGenerations(t *testing.T, s *suite) {
	g := s.start(t)
	g.must(t, "POST", "/side", nil, "")
	var image runtime.Image
	want := "ID=template\n"
	for n := range 4 {
		if n > 0 {
			g = s.restore(t, image)
		}
		if got := g.count(t); got != n+1 {
			t.Errorf("generation %d: asked %d times", n, got)
		}
		line := fmt.Sprintf("generation %d\n", n)
		want += line
		if err := g.write(t.Context(), "/etc/os-release", 0, line); err != nil {
			t.Fatal(err)
		}
		if got := g.read(t, "/etc/os-release"); got != want {
			t.Errorf("generation %d reads %q, want %q", n, got, want)
		}
		image = g.snapshot(t, runtime.ImageMemory, n%2 == 1)
		if err := g.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.checkNothingLeft(t, g.cfg)
	}
}

func testFullMemoryImage(t *testing.T, s *suite) {
	g := s.start(t)
	g.must(t, "POST", "/alloc", url.Values{"mib": {"220"}}, "") // of 256
	image := g.snapshot(t, runtime.ImageMemory, true)
	if err := g.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	r := s.restore(t, image)
	t.Log("restore until the first answer took", time.Since(begin))
	r.call(t.Context(), "POST", "/alloc", url.Values{"mib": {"1024"}}, "") // breaks off
	if exit := awaitEnd(t, r, 30*time.Second); !exit.OutOfMemory {
		t.Errorf("the memory limit is lost: exit is %+v", exit)
	}
}

// testManyFiles: what the runtime needs for an image of many small things comes
// not out of the guest's memory, which would end it.
func testManyFiles(t *testing.T, s *suite) {
	small := func(c *runtime.Config) { c.Resources.MemoryMiB = 64; c.Resources.DiskMiB = 256 }
	g := s.start(t, small)
	const n = 20_000
	g.must(t, "POST", "/file", url.Values{"op": {"many"}, "path": {"/etc/many"}, "n": {strconv.Itoa(n)}}, "")
	for _, kind := range []runtime.ImageKind{runtime.ImageFiles, runtime.ImageMemory} {
		image := g.snapshot(t, kind, kind == runtime.ImageMemory)
		begin := time.Now()
		r := s.restore(t, image, small)
		t.Log("restore until the first answer took", time.Since(begin))
		if got := r.read(t, fmt.Sprintf("/etc/many/%d", n-1)); got != "x" {
			t.Errorf("the last file reads %q", got)
		}
		if err := r.Stop(t.Context()); err != nil {
			t.Error(err)
		}
	}
	if err := g.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.must(t, "GET", "/ping", nil, "")
	g.call(t.Context(), "POST", "/alloc", url.Values{"mib": {"512"}}, "") // breaks off
	if exit := awaitEnd(t, g, 30*time.Second); !exit.OutOfMemory {
		t.Errorf("the memory limit is lost: exit is %+v", exit)
	}
}
