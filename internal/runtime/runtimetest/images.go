package runtimetest

// Images: what they keep, what snapshots do to the instance they are taken of,
// and what becomes of copies.

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// snapshot takes an image of the guest.
func (g *guest) snapshot(t *testing.T, kind runtime.ImageKind, pause bool) runtime.Image {
	t.Helper()
	image := runtime.Image{Dir: t.TempDir(), Kind: kind}
	if kind == runtime.ImageFiles {
		g.must(t, "POST", "/sync", nil, "")
	}
	begin := time.Now()
	if err := g.Snapshot(t.Context(), image, pause); err != nil {
		t.Fatal(err)
	}
	t.Logf("snapshot of %s took %v", kind, time.Since(begin))
	return image
}

// count asks the guest's child process how often it was asked.
func (g *guest) count(t *testing.T) int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, "GET", "http://"+g.addr(sidePort), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := g.client.Do(req)
		if err != nil {
			if ctx.Err() != nil {
				t.Fatalf("child process does not answer: %v", err)
			}
			<-time.After(2 * time.Millisecond) // a refused connection is the only sign that it does not listen yet
			continue
		}
		text, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		n, aerr := strconv.Atoi(string(text))
		if err != nil || aerr != nil {
			t.Fatalf("child process answers %q, %v", text, err)
		}
		return n
	}
}

func (g *guest) number(t *testing.T, path string) int {
	t.Helper()
	text := g.must(t, "GET", path, nil, "")
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s answers %q", path, text)
	}
	return n
}

// echo is a connection to the guest's echo server.
type echo struct {
	net.Conn
	lines *bufio.Reader
}

func (g *guest) dialEcho(t *testing.T) *echo {
	t.Helper()
	c, err := new(net.Dialer).DialContext(t.Context(), "tcp", g.addr(echoPort))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	e := &echo{c, bufio.NewReader(c)}
	e.check(t, "first words")
	return e
}

// check sends a line and wants it back.
func (e *echo) check(t *testing.T, line string) {
	t.Helper()
	if err := e.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(e, line)
	if got, err := e.lines.ReadString('\n'); err != nil || got != line+"\n" {
		t.Fatalf("echo of %q is %q, %v", line, got, err)
	}
}

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

func testSnapshotGoesOn(t *testing.T, s *suite) {
	g := s.start(t)
	in := g.dialEcho(t)
	g.must(t, "POST", "/dial", url.Values{"addr": {s.Outside(t).String()}}, "")
	for _, kind := range []runtime.ImageKind{runtime.ImageMemory, runtime.ImageFiles, runtime.ImageMemory} {
		g.snapshot(t, kind, false)
		in.check(t, "still there after an image of "+string(kind))
		if got := g.must(t, "POST", "/dialled", nil, "still there"); got != "still there" {
			t.Errorf("the guest's connection to outside answers %q", got)
		}
		if err := g.Resume(t.Context()); err != nil {
			t.Errorf("resuming what runs: %v", err)
		}
	}
	if n := g.number(t, "/conns"); n != 2 {
		t.Errorf("the guest has %d connections, want 2", n)
	}
}

func testConnectionsClosed(t *testing.T, s *suite) {
	g := s.start(t)
	in := g.dialEcho(t)
	outside := url.Values{"addr": {s.Outside(t).String()}}
	g.must(t, "POST", "/dial", outside, "")
	for _, pause := range []bool{false, true} {
		r := s.restore(t, g.snapshot(t, runtime.ImageMemory, pause))
		// The reads that wait for somebody of before have to end.
		deadline := time.Now().Add(time.Second)
		for r.number(t, "/conns") > 0 {
			if time.Now().After(deadline) {
				t.Fatalf("the guest still waits at %d connections of before the snapshot", r.number(t, "/conns"))
			}
		}
		begin := time.Now()
		if got, err := r.call(t.Context(), "POST", "/dialled", nil, "still there"); err == nil {
			t.Errorf("a connection to outside goes on in the copy: %q", got)
		} else if took := time.Since(begin); took > time.Second {
			t.Errorf("it took %v to see that a connection is closed: %v", took, err)
		}
		r.dialEcho(t)
		r.must(t, "POST", "/dial", outside, "")
	}
	if err := g.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The copies have not disturbed whose they were.
	in.check(t, "and on")
	if got := g.must(t, "POST", "/dialled", nil, "and on"); got != "and on" {
		t.Errorf("the guest's connection to outside answers %q", got)
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

// lastTick reads what the guest streams until it falls silent, and returns the
// last tick.
func lastTick(t *testing.T, c net.Conn, lines *bufio.Reader) int {
	t.Helper()
	last := -1
	for {
		if err := c.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		line, err := lines.ReadString('\n')
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return last
		}
		if err != nil {
			t.Fatalf("the stream ended: %v", err)
		}
		if n, err := strconv.Atoi(strings.TrimSpace(line)); err == nil { // not a header
			last = n
		}
	}
}

func testPause(t *testing.T, s *suite) {
	g := s.start(t)
	for _, kind := range []runtime.ImageKind{runtime.ImageMemory, runtime.ImageFiles} {
		c, err := net.Dial("tcp", g.addr(guestPort))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		fmt.Fprintf(c, "GET /stream HTTP/1.0\r\n\r\n")
		lines := bufio.NewReader(c)
		if _, err := lines.ReadString('\n'); err != nil {
			t.Fatal(err)
		}
		image := g.snapshot(t, kind, true)
		last := lastTick(t, c, lines)
		if last < 0 {
			t.Fatal("nothing was streamed before the pause")
		}
		if kind == runtime.ImageMemory {
			r := s.restore(t, image)
			if got := r.number(t, "/ticks"); got < last {
				t.Errorf("the guest showed tick %d, and the image of it has %d", last, got)
			}
		}
		if _, err := g.Stats(t.Context()); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := g.Resume(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := lines.ReadString('\n'); err != nil {
			t.Errorf("after the resume: %v", err)
		}
		g.must(t, "GET", "/ping", nil, "")
	}
	g.snapshot(t, runtime.ImageMemory, true)
	if err := g.Stop(t.Context()); err != nil {
		t.Error("stopping what is paused:", err)
	}
	s.checkNothingLeft(t, g.cfg)
}

func testAdoptPaused(t *testing.T, s *suite) {
	g := s.start(t)
	in := g.dialEcho(t)
	image := g.snapshot(t, runtime.ImageMemory, true)
	inst, err := s.Reopen(t).Adopt(t.Context(), g.cfg.ID, g.State())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := inst.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	in.check(t, "and on")
	s.restore(t, image)
	again := runtime.Image{Dir: t.TempDir(), Kind: runtime.ImageMemory}
	if err := inst.Snapshot(t.Context(), again, true); err != nil {
		t.Fatal(err)
	}
	if err := inst.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	in.check(t, "and further")

	s.BeginPause(t, inst)
	for range 2 {
		if err := inst.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
		in.check(t, "it was never stopped")
	}
}

// testResumeByAnother: an agent was killed while it took a snapshot, which the
// engine goes on with. The next one finds the instance so and lets it go on.
func testResumeByAnother(t *testing.T, s *suite) {
	g := s.start(t)
	g.must(t, "POST", "/alloc", url.Values{"mib": {"150"}}, "")
	in := g.dialEcho(t)
	second := s.Reopen(t)
	for _, kind := range []runtime.ImageKind{runtime.ImageMemory, runtime.ImageFiles} {
		for _, after := range []time.Duration{0, 1, 5, 20, 60} {
			image := runtime.Image{Dir: t.TempDir(), Kind: kind}
			over := make(chan error)
			go func() { over <- g.Snapshot(t.Context(), image, true) }()
			awaitFile(t, image.Dir) // from here on the old one does nothing to the guest any more
			<-time.After(after * time.Millisecond)
			inst, err := second.Adopt(t.Context(), g.cfg.ID, g.State())
			if err == nil {
				err = inst.Resume(t.Context())
			}
			if err != nil {
				t.Fatalf("resume after %v ms: %v", int(after), err)
			}
			if err := <-over; err != nil {
				t.Logf("after %v ms: %v", int(after), err)
			}
			if err := inst.Resume(t.Context()); err != nil {
				t.Fatal(err)
			}
			in.check(t, fmt.Sprintf("goes on after %v ms", int(after)))
		}
	}
	s.restore(t, g.snapshot(t, runtime.ImageMemory, false)) // it is whole
}

// awaitFile waits until the first file of an image is there.
func awaitFile(t *testing.T, dir string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(time.Millisecond) {
		if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no file of the image is written")
		}
	}
}

func testAdoptRestored(t *testing.T, s *suite) {
	first := s.start(t)
	r := s.restore(t, first.snapshot(t, runtime.ImageMemory, true))
	inst, err := s.Reopen(t).Adopt(t.Context(), r.cfg.ID, r.State())
	if err != nil {
		t.Fatal(err)
	}
	r.call(t.Context(), "POST", "/exit", url.Values{"code": {"5"}}, "")
	for name, i := range map[string]runtime.Instance{"restorer": r, "adopter": inst} {
		if exit := awaitEnd(t, i, 10*time.Second); !strings.Contains(exit.Reason, "status 5") {
			t.Errorf("%s: exit is %+v", name, exit)
		}
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

// changes are what is done to files before an image of them is taken, each with
// a path that shows whether it was kept.
var changes = []struct {
	path string
	do   url.Values
}{
	{"/etc/unwanted", url.Values{"op": {"remove"}}},
	{"/etc/old", url.Values{"op": {"rename"}, "to": {"/etc/new"}}},
	{"/etc/new", url.Values{"op": {"chmod"}, "mode": {"4751"}}},
	{"/etc/dir", url.Values{"op": {"mkdir"}, "mode": {"755"}}},
	{"/etc/dir", url.Values{"op": {"chmod"}, "mode": {"1777"}}},
	{"/etc/dir/sym", url.Values{"op": {"symlink"}, "to": {"../new"}}},
	{"/etc/dir/fifo", url.Values{"op": {"fifo"}, "mode": {"640"}}},
	{"/etc/owned", url.Values{"op": {"chown"}, "uid": {"1000"}, "gid": {"1001"}}},
	{"/etc/linked", url.Values{"op": {"link"}, "to": {"/etc/owned"}}},
	{"/usr", url.Values{"op": {"chmod"}, "mode": {"711"}}},
	{"/etc/lower", url.Values{"op": {"remove"}}}, // and made anew, empty
	{"/etc/lower", url.Values{"op": {"mkdir"}, "mode": {"700"}}},
	{"/etc/lower/inside", nil},
	{"/etc/lower/again", url.Values{"op": {"write"}, "to": {"text"}}},
	{"/etc/lower/again", url.Values{"op": {"touch"}, "at": {"1234567890"}}},
	{"/etc/lower2", url.Values{"op": {"rename"}, "to": {"/etc/moved"}}},
	{"/etc/moved/inside", nil},
	{"/etc/sparse", url.Values{"op": {"sparse"}}},
	{"/etc/" + strings.Repeat("long", 60), url.Values{"op": {"write"}, "to": {"x"}}},
	{"/etc/name with\n line and ümläut", url.Values{"op": {"write"}, "to": {"x"}}},
	{"/etc/high", url.Values{"op": {"write"}, "to": {"x"}}},
	{"/etc/high", url.Values{"op": {"chown"}, "uid": {"3000000000"}, "gid": {"2500000"}}},
	{"/etc/xattr", url.Values{"op": {"write"}, "to": {"x"}}},
	{"/etc/xattr", url.Values{"op": {"setxattr"}, "to": {"value"}}},
}

// shown is what the guest says of all paths that were changed.
func shown(t *testing.T, g *guest) string {
	t.Helper()
	var all strings.Builder
	for _, c := range changes {
		query := url.Values{"path": {c.path}}
		if c.do.Get("op") == "touch" {
			query.Set("time", "1") // that of others is rounded to seconds
		}
		fmt.Fprintf(&all, "%s: %s\n", c.path, g.must(t, "GET", "/stat", query, ""))
	}
	return all.String()
}

func testFilesImage(t *testing.T, s *suite) {
	g := s.start(t)
	if err := g.write(t.Context(), "/etc/owned", 3, "end\n"); err != nil {
		t.Fatal(err)
	}
	for _, c := range changes {
		if c.do != nil {
			c.do.Set("path", c.path)
			g.must(t, "POST", "/file", c.do, "")
		}
	}
	if err := g.write(t.Context(), "/etc/hosts", 0, "10.9.8.7 added\n"); err != nil {
		t.Fatal(err)
	}
	want := shown(t, g)
	for _, part := range []string{"/etc/unwanted: gone\n", "/etc/old: gone\n", "/etc/new: 104751 0:0 ", "/etc/linked: 100644 1000:1001 links 2 size ", "/etc/dir/sym: 120777 0:0 links 1 to ../new\n"} {
		if !strings.Contains(want, part) {
			t.Fatalf("before the image:\n%swithout %q", want, part)
		}
	}
	g.must(t, "POST", "/side", nil, "")
	g.count(t)
	image := g.snapshot(t, runtime.ImageFiles, true)
	if err := g.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}

	check := func(r *guest) {
		t.Helper()
		if c, err := net.Dial("tcp", r.addr(sidePort)); err == nil {
			c.Close()
			t.Error("a process of before runs")
		}
		if got := shown(t, r); got != want {
			t.Errorf("files are:\n%swant:\n%s", got, want)
		}
		for _, path := range []string{"/etc/owned", "/etc/linked"} {
			if got := r.read(t, path); len(got) != 3<<20+4 || !strings.HasSuffix(got, "\x01end\n") {
				t.Errorf("%s has %d bytes", path, len(got))
			}
		}
		if got := r.read(t, "/etc/new"); got != "old\n" {
			t.Errorf("the renamed file reads %q", got)
		}
		if got := r.read(t, "/etc/os-release"); got != "ID=template\n" {
			t.Errorf("the template's file reads %q", got)
		}
		if got := r.read(t, "/etc/hosts"); !strings.HasSuffix(got, "10.9.8.7 added\n") {
			t.Errorf("hosts reads %q", got)
		}
		if got := r.must(t, "GET", "/ping", nil, ""); got != "hello pid=1 host=guesthost" {
			t.Errorf("guest says %q", got)
		}
		if got := r.read(t, "/proc/mounts"); strings.Contains(got, " /tmp ") {
			t.Errorf("/tmp is a mount of its own:\n%s", got)
		}
	}
	r := s.restore(t, image)
	check(r)
	// And again, from what was made of an image of files, and from one of memory.
	again := s.restore(t, r.snapshot(t, runtime.ImageFiles, false))
	check(again)
	check(s.restore(t, again.snapshot(t, runtime.ImageMemory, false)))
}

func testRestoreCancelled(t *testing.T, s *suite) {
	g := s.start(t)
	image := g.snapshot(t, runtime.ImageMemory, true)
	for _, after := range []time.Duration{0, 5, 15, 30, 45, 60, 75, 90, 110, 130} {
		cfg := s.config(t)
		ctx, cancel := context.WithTimeout(t.Context(), after*time.Millisecond)
		inst, err := s.Runtime.Restore(ctx, cfg, image)
		cancel()
		switch {
		case err == nil: // it was faster
			if err := inst.Stop(t.Context()); err != nil {
				t.Error(err)
			}
		case !errors.Is(err, context.DeadlineExceeded):
			t.Errorf("cancelled after %v ms: %v", int(after), err)
		}
		s.checkNothingLeft(t, cfg)
	}
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

// testFilesOfMemory takes an image of memory as one of files, which a runtime may refuse
// that has not got them apart.
func testFilesOfMemory(t *testing.T, s *suite) {
	g := s.start(t)
	if err := g.write(t.Context(), "/kept", 0, "kept"); err != nil {
		t.Fatal(err)
	}
	g.must(t, "POST", "/sync", nil, "")
	image := g.snapshot(t, runtime.ImageMemory, true)
	if err := g.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	image.Kind = runtime.ImageFiles
	cfg := s.config(t)
	inst, err := s.Runtime.Restore(t.Context(), cfg, image)
	if errors.Is(err, sandbox.ErrInvalid) {
		t.Log("refused:", err)
		s.checkNothingLeft(t, cfg)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := inst.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := s.restore(t, image).read(t, "/kept"); got != "kept" {
		t.Errorf("its file reads %q", got)
	}
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
