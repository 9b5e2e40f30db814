package runtimetest

// What images of files keep.

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"testing"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

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
