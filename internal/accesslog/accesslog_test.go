package accesslog

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// platformLog keeps what is said to the platform's log.
type platformLog struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (p *platformLog) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.text.Write(b)
}

func (p *platformLog) warnings() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Count(p.text.String(), "level=WARN")
}

func (p *platformLog) logger() *slog.Logger { return slog.New(slog.NewTextHandler(p, nil)) }

func closeLog(t *testing.T, l *Log) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := l.Close(ctx); err != nil {
		t.Fatal(err)
	}
}

// lines reads a log; each must be whole.
func lines(t *testing.T, path string) (all []line) {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range bytes.SplitAfter(text, []byte{'\n'}) {
		if len(l) > 0 {
			all = append(all, read(t, l))
		}
	}
	return all
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 10 s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestLinesAreOnDiskWithinASecondAndAtTheEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	l, err := Open(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer closeLog(t, l)
	begun := time.Now()
	l.Write(&Entry{Path: "/1"})
	eventually(t, "line on disk", func() bool { return len(lines(t, path)) == 1 })
	if took := time.Since(begun); took > time.Second {
		t.Errorf("took %s", took)
	}
	l.Write(&Entry{Path: "/2"})
	closeLog(t, l)
	if got := lines(t, path); len(got) != 2 || got[1].Path != "/2" {
		t.Errorf("the file has %+v", got)
	}
	l.Write(&Entry{}) // into nowhere
	if n := count(l, "wrenn_access_log_dropped_lines_total"); n != 1 {
		t.Errorf("%d lines dropped", n)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	var none *Log
	none.Write(&Entry{})
	closeLog(t, none)
}

func TestFullLogIsSetAsideAndNoLineIsLost(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	out, err := openFile(path, 10<<10)
	if err != nil {
		t.Fatal(err)
	}
	l := start(out, nil)
	const all = 80 // of about 230 bytes
	for i := range all {
		l.Write(&Entry{Path: fmt.Sprint("/", i)})
		eventually(t, "flush", func() bool { kick(l); return count(l, "wrenn_access_log_lines_total") == i+1 })
	}
	closeLog(t, l)
	got := append(lines(t, path+".1"), lines(t, path)...)
	if len(got) != all {
		t.Fatalf("%d lines", len(got))
	}
	for i, l := range got {
		if l.Path != fmt.Sprint("/", i) {
			t.Fatalf("line %d is %+v", i, l)
		}
	}
	for _, name := range []string{path, path + ".1"} {
		if info, _ := os.Stat(name); info.Size() > 10<<10 || info.Size() == 0 || info.Mode().Perm() != 0o600 {
			t.Errorf("%s has %d bytes, mode %v", name, info.Size(), info.Mode())
		}
	}
}

// kick makes the log write out at once.
func kick(l *Log) {
	select {
	case l.full <- struct{}{}:
	default:
	}
}

func TestLogThatIsMovedAwayIsBegunAnew(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	l, err := Open(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.Write(&Entry{Path: "/1"})
	eventually(t, "flush", func() bool { kick(l); return len(lines(t, path)) == 1 })
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	l.Write(&Entry{Path: "/2"})
	closeLog(t, l)
	if a, b := lines(t, path+".moved"), lines(t, path); len(a) != 1 || len(b) != 1 || b[0].Path != "/2" {
		t.Errorf("moved: %+v, new: %+v", a, b)
	}
}

func TestHalfALineOfACrashIsTakenAway(t *testing.T) {
	whole := string((&Entry{Path: "/1"}).appendTo(nil))
	foreign := "not ours"
	for name, c := range map[string]struct{ before, want string }{
		"none":            {"", ""},
		"whole":           {whole, whole},
		"half":            {whole + whole[:20], whole},
		"a few bytes":     {whole + whole[:3], whole},
		"only half":       {whole[:20], ""},
		"somebody else's": {whole + foreign, whole + foreign + "\n"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "access.log")
			os.WriteFile(path, []byte(c.before), 0o600)
			l, err := Open(path, nil)
			if err != nil {
				t.Fatal(err)
			}
			l.Write(&Entry{Path: "/1"})
			closeLog(t, l)
			if got, _ := os.ReadFile(path); string(got) != c.want+whole {
				t.Errorf("the file is %q", got)
			}
		})
	}
}

func TestFullDiskLosesWholeLinesAndIsCounted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mounts a small file system: needs root")
	}
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("mount tmpfs:", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	path := filepath.Join(dir, "access.log")
	said := &platformLog{}
	l, err := Open(path, said.logger())
	if err != nil {
		t.Fatal(err)
	}
	const all = 2000 // several times what there is room for
	for i := range all {
		l.Write(&Entry{Path: fmt.Sprint("/", i)})
		if i%100 == 0 {
			kick(l)
		}
	}
	eventually(t, "lines are dropped", func() bool { kick(l); return count(l, "wrenn_access_log_dropped_lines_total") > 0 })
	eventually(t, "all lines are accounted for", func() bool {
		return count(l, "wrenn_access_log_lines_total")+count(l, "wrenn_access_log_dropped_lines_total") == all
	})
	if n := count(l, "wrenn_access_log_lines_total"); len(lines(t, path)) != n || n == 0 {
		t.Errorf("%d whole lines in the file, %d counted", len(lines(t, path)), n)
	}
	if n := said.warnings(); n != 1 {
		t.Errorf("%d warnings: %s", n, said.text.String())
	}

	// Room again: it goes on.
	if err := os.Truncate(path, 0); err != nil {
		t.Fatal(err)
	}
	l.Write(&Entry{Path: "/again"})
	closeLog(t, l)
	if got := lines(t, path); len(got) != 1 || got[0].Path != "/again" {
		t.Errorf("after there was room again the file has %+v", got)
	}
}

// stuck is a disk that does not answer until it is freed.
type stuck struct {
	free    chan struct{}
	written int
}

func (s *stuck) write(b []byte) (int, error) {
	<-s.free
	s.written += countLines(b)
	return 0, nil
}
func (s *stuck) Close() error { return nil }

func TestSlowDiskHoldsNobodyUp(t *testing.T) {
	out, said := &stuck{free: make(chan struct{})}, &platformLog{}
	l := start(out, said.logger())
	const all = 20000
	begun := time.Now()
	for range all {
		l.Write(&Entry{Path: strings.Repeat("x", 100)})
	}
	if took := time.Since(begun); took > 5*time.Second {
		t.Errorf("%d lines took %s", all, took)
	}
	if dropped := count(l, "wrenn_access_log_dropped_lines_total"); dropped == 0 || dropped == all {
		t.Errorf("%d lines dropped", dropped)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := l.Close(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("closing a stuck log: %v", err)
	}
	close(out.free)
	closeLog(t, l)
	if dropped := count(l, "wrenn_access_log_dropped_lines_total"); dropped+out.written != all {
		t.Errorf("%d lines dropped, %d written, of %d", dropped, out.written, all)
	}
	if n := said.warnings(); n != 1 {
		t.Errorf("%d warnings: %s", n, said.text.String())
	}
}

func TestManyWritersGetWholeLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	l, err := Open(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	var g sync.WaitGroup
	for i := range 8 {
		g.Go(func() {
			for range 40 {
				l.Write(&Entry{Port: uint16(i), Path: strings.Repeat("\x00", maxPath)})
			}
		})
	}
	g.Wait()
	closeLog(t, l)
	dropped := count(l, "wrenn_access_log_dropped_lines_total")
	if got := len(lines(t, path)); got+dropped != 320 || got == 0 {
		t.Errorf("%d lines and %d dropped", got, dropped)
	}
}

func TestReaderOfStandardOutputThatGoesAwayEndsNothing(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(1)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Dup2(int(w.Fd()), 1); err != nil {
		t.Fatal(err)
	}
	restore := func() { unix.Dup2(fd, 1) }
	defer restore()
	l, err := Open(Stdout, nil)
	if err != nil {
		t.Fatal(err)
	}
	l.Write(&Entry{Path: "/1"})
	kick(l)
	first := make([]byte, 4096)
	n, err := r.Read(first)
	if err != nil || read(t, first[:n]).Path != "/1" {
		t.Errorf("standard output has %q, %v", first[:n], err)
	}
	r.Close()
	l.Write(&Entry{Path: "/2"})
	closeLog(t, l)
	restore()
	w.Close()
	if n := count(l, "wrenn_access_log_dropped_lines_total"); n != 1 {
		t.Errorf("%d lines dropped", n)
	}
}

func TestWhatIsNoFileIsRefused(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, pipe, filepath.Join(dir, "none", "access.log")} {
		if l, err := Open(path, nil); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %v", path, err)
			if l != nil {
				closeLog(t, l)
			}
		}
	}
	l, err := Open(os.DevNull, nil)
	if err != nil {
		t.Fatal(err)
	}
	closeLog(t, l)
}

// count is the value of one of the log's metrics.
func count(l *Log, name string) int {
	registry := prometheus.NewRegistry()
	registry.MustRegister(l)
	families, err := registry.Gather()
	if err != nil {
		panic(err)
	}
	for _, f := range families {
		if f.GetName() == name {
			return int(f.GetMetric()[0].GetCounter().GetValue())
		}
	}
	panic("no metric " + name)
}
