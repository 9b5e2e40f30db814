package envd_test

import (
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/api/proto/process"
)

// usage is what the agent holds. Goroutines are counted by TestSoakGoroutines.
type usage struct{ fds, zombies, threads, rssKiB int }

func (a *realAgent) usage(t *testing.T) usage {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.pid))
	if err != nil {
		t.Fatal(err)
	}
	u := usage{fds: len(fds)}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		fields := strings.Fields(line)
		switch fields[0] {
		case "Threads:":
			u.threads, _ = strconv.Atoi(fields[1])
		case "VmRSS:":
			u.rssKiB, _ = strconv.Atoi(fields[1])
		}
	}
	stats, _ := os.ReadDir("/proc")
	for _, entry := range stats {
		data, err := os.ReadFile("/proc/" + entry.Name() + "/stat")
		if err != nil {
			continue
		}
		fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
		if fields[0] == "Z" && fields[1] == strconv.Itoa(a.pid) {
			u.zombies++
		}
	}
	return u
}

// many calls do n times, several at a time.
func many(t *testing.T, n int, do func(i int) error) {
	t.Helper()
	const workers = 8
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := w; i < n; i += workers {
				if err := do(i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestSoak uses an agent for long and looks whether it holds more at the end than
// once it was warm. In full (WRENN_SOAK=full, `make soak`) it takes minutes.
func TestSoak(t *testing.T) {
	processes, terminals, watches := 2000, 100, 500
	if os.Getenv("WRENN_SOAK") == "full" {
		processes, terminals, watches = 100_000, 1000, 10_000
	}
	flags := []string{"-init"}
	if os.Getuid() == 0 {
		flags = append(flags, "-cgroups", cgroupDir(t))
	}
	a := startRealAgent(t, flags...)
	dir := t.TempDir()
	parts := []struct {
		name string
		n    int
		do   func(i int) error
	}{
		{"processes", processes, func(int) error { return a.once(t, "/bin/true", false) }},
		{"terminals", terminals, func(int) error { return a.once(t, "/bin/true", true) }},
		{"watches", watches, func(int) error { return a.watchOnce(t, dir) }},
	}
	for _, part := range parts {
		many(t, max(part.n/10, 100), part.do)
	}
	many(t, 600, parts[0].do) // more than the ended processes that are kept
	a.http.CloseIdleConnections()
	before := a.usage(t)
	for _, part := range parts {
		many(t, part.n, part.do)
		a.http.CloseIdleConnections()
		t.Logf("after %d %s: %+v", part.n, part.name, a.usage(t))
	}
	var after usage
	eventually(t, "descriptors as before, no zombies", func() bool {
		after = a.usage(t)
		return after.fds <= before.fds+2 && after.zombies == 0
	})
	t.Logf("before %+v, after %+v", before, after)
	if grown := after.rssKiB - before.rssKiB; grown > 8<<10 {
		t.Errorf("the agent has grown by %d KiB", grown)
	}
	if after.threads > before.threads+8 {
		t.Errorf("the agent has %d threads, %d before", after.threads, before.threads)
	}
}

// TestSoakGoroutines counts them in an agent that is part of this process.
func TestSoakGoroutines(t *testing.T) {
	processes, terminals, watches := 1000, 100, 500
	if os.Getenv("WRENN_SOAK") == "full" {
		processes, terminals, watches = 10_000, 1000, 10_000
	}
	a := startAgent(t)
	dir := t.TempDir()
	use := func(processes, terminals, watches int) (goroutines func() int) {
		many(t, processes, func(int) error { return a.once(t, "/bin/true", false) })
		many(t, terminals, func(int) error { return a.once(t, "/bin/true", true) })
		many(t, watches, func(int) error { return a.watchOnce(t, dir) })
		return func() int {
			a.http.CloseIdleConnections()
			return runtime.NumGoroutine()
		}
	}
	goroutines := use(20, 20, 20)
	var before int
	eventually(t, "goroutines settle", func() bool {
		last := before
		before = goroutines()
		return before == last
	})
	goroutines = use(processes, terminals, watches)
	after := 0
	eventually(t, fmt.Sprintf("%d goroutines as before", before), func() bool {
		after = goroutines()
		return after <= before+1
	})
	t.Logf("before %d goroutines, after %d", before, after)
}

// once runs a program to its end.
func (a *agent) once(t *testing.T, program string, terminal bool) error {
	off := false
	req := &process.StartRequest{Process: &process.ProcessConfig{Cmd: program}, Stdin: &off}
	if terminal {
		req.Stdin, req.Pty = nil, &process.PTY{Size: &process.PTY_Size{Cols: 80, Rows: 24}}
	}
	s, err := a.processes().Start(t.Context(), req)
	if err != nil {
		return err
	}
	defer s.Close()
	ended := false
	for s.Receive() {
		if end := s.Msg().GetEvent().GetEnd(); end != nil {
			if ended = end.GetExited() && end.GetExitCode() == 0; !ended {
				return fmt.Errorf("%s ended with %v", program, end)
			}
		}
	}
	if s.Err() == nil && !ended {
		return fmt.Errorf("%s: no end event", program)
	}
	return s.Err()
}

// watchOnce makes a watcher and removes it.
func (a *agent) watchOnce(t *testing.T, dir string) error {
	c := a.filesystem()
	w, err := c.CreateWatcher(t.Context(), &filesystem.CreateWatcherRequest{Path: dir, Recursive: true})
	if err != nil {
		return err
	}
	_, err = c.RemoveWatcher(t.Context(), &filesystem.RemoveWatcherRequest{WatcherId: w.GetWatcherId()})
	return err
}
