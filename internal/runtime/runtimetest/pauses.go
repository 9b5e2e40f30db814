package runtimetest

// Pause and resume, also by an agent that has not seen the pause.

import (
	"bufio"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/runtime"
)

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
