package runtimetest

// What snapshots do to connections.

import (
	"net/url"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/runtime"
)

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
