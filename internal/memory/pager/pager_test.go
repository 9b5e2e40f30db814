package pager

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// fixture is a pager of this process, and an image.
type fixture struct {
	dir    string
	client *Client
	pager  *Pager
	data   []byte
	image  string
	file   string // with data
}

// wholeSource has a memory of which everything is dirty.
type wholeSource []byte

func (s wholeSource) Dirty(context.Context) iter.Seq2[memory.Range, error] {
	return func(yield func(memory.Range, error) bool) { yield(memory.Range{Length: int64(len(s))}, nil) }
}

func (s wholeSource) Read(_ context.Context, p []byte, ranges []memory.Range) error {
	for _, r := range ranges {
		p = p[copy(p, s[r.Offset:][:r.Length]):]
	}
	return nil
}

func newFixture(t *testing.T, pages, layers int, hook func(string)) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("userfaultfd for the kernel's accesses needs root")
	}
	f := &fixture{dir: t.TempDir(), data: make([]byte, pages*4096)}
	rnd := rand.New(rand.NewPCG(uint64(pages), uint64(layers)))
	var parent *memory.Image
	for n := range layers {
		for i := range pages {
			if rnd.IntN(layers) > 0 && n > 0 {
				continue
			}
			p := f.data[i*4096:][:4096]
			clear(p)
			if rnd.IntN(4) > 0 {
				p[0] = byte(1 + i%200)
				p[rnd.IntN(4096)] = byte(1 + n)
			}
		}
		f.image = filepath.Join(f.dir, fmt.Sprint("image", n))
		if err := os.Mkdir(f.image, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := memory.Write(t.Context(), f.image, int64(len(f.data)), parent, wholeSource(f.data)); err != nil {
			t.Fatal(err)
		}
		img, err := memory.Open(f.image)
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		parent = img
	}
	f.file = filepath.Join(f.dir, "data")
	if err := os.WriteFile(f.file, f.data, 0o600); err != nil {
		t.Fatal(err)
	}
	f.start(t, hook)
	return f
}

func (f *fixture) start(t *testing.T, hook func(string)) {
	t.Helper()
	f.pager = newPager(slog.New(slog.NewTextHandler(t.Output(), nil)))
	f.pager.hook = hook
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- f.pager.serve(ctx, f.dir+"/pager", func() { close(ready) }) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("pager: %v", err)
		}
	})
	select {
	case <-ready:
	case err := <-done:
		t.Fatal(err)
	}
	var err error
	if f.client, err = Dial(t.Context(), f.dir+"/pager"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.client.Close() })
}

// rewrite makes another image, after a change of data.
func (f *fixture) rewrite(t *testing.T) {
	t.Helper()
	f.image = f.dir + "/other"
	if err := os.Mkdir(f.image, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := memory.Write(t.Context(), f.image, int64(len(f.data)), nil, wholeSource(f.data)); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(f.file, f.data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) vm(id string) VM {
	return VM{ID: id, Image: f.image, Socket: f.dir + "/" + id + ".sock"}
}

// monitor is a child that plays one.
type testMonitor struct {
	cmd   *exec.Cmd
	stdin io.WriteCloser
	out   *bufio.Reader
}

func (f *fixture) monitor(t *testing.T, vm VM, mode string, threads int, huge bool) *testMonitor {
	t.Helper()
	if err := f.client.Register(t.Context(), vm); err != nil {
		t.Fatal(err)
	}
	order, err := json.Marshal(childOrder{Mode: mode, Socket: vm.Socket, Memory: f.file, Size: len(f.data), Threads: threads, Huge: huge})
	if err != nil {
		t.Fatal(err)
	}
	m := &testMonitor{cmd: exec.CommandContext(t.Context(), os.Args[0])}
	m.cmd.Env = append(os.Environ(), childEnv+"="+string(order))
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	m.cmd.Stderr = t.Output()
	out, err := m.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if m.stdin, err = m.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	m.out = bufio.NewReader(out)
	if line := m.line(t); line != "ready" {
		t.Fatalf("the child says %q", line)
	}
	return m
}

func (m *testMonitor) line(t *testing.T) string {
	t.Helper()
	line, err := m.out.ReadString('\n')
	if err != nil {
		t.Fatalf("the child ends: %v (%q, %v)", err, line, m.cmd.Wait())
	}
	return strings.TrimSpace(line)
}

func (m *testMonitor) say(t *testing.T, format string, args ...any) {
	t.Helper()
	if _, err := fmt.Fprintf(m.stdin, format+"\n", args...); err != nil {
		t.Fatal(err)
	}
}

func (m *testMonitor) ask(t *testing.T, format string, args ...any) string {
	t.Helper()
	m.say(t, format, args...)
	return m.line(t)
}

// succeeds waits for the child and what it thinks of its memory.
func (m *testMonitor) succeeds(t *testing.T) {
	t.Helper()
	m.stdin.Close()
	rest, _ := io.ReadAll(m.out)
	if err := m.cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, bytes.TrimSpace(rest))
	}
}

// ends waits until nothing of the virtual machine is served any more.
func (f *fixture) ends(t *testing.T, id string) Status {
	t.Helper()
	f.pager.mu.Lock()
	a := f.pager.vms[id]
	f.pager.mu.Unlock()
	select {
	case <-a.done:
	case <-time.After(30 * time.Second):
		t.Fatal("it is served for ever")
	}
	st, err := f.client.Status(t.Context(), id)
	if err != nil || st.State != StateEnded {
		t.Errorf("%+v (%v), want it to have ended", st, err)
	}
	return st
}

// TestBytes compares every page of random layer stacks, touched from many threads.
func TestBytes(t *testing.T) {
	t.Parallel()
	for _, c := range []struct{ pages, layers, threads, around int }{{1500, 1, 4, 4096}, {2000, 5, 8, 0}, {777, 12, 8, 16 << 10}} {
		f := newFixture(t, c.pages, c.layers, nil)
		vm := f.vm("a")
		vm.Around, vm.Threads = int64(c.around), 1+c.layers%3
		f.monitor(t, vm, "touch", c.threads, false).succeeds(t)
		st := f.ends(t, "a")
		if st.Reason != "" || st.Faults == 0 || st.Copied+st.Zeroed != int64(len(f.data)) {
			t.Errorf("%+v: want every page put in once, and no reason", st)
		}
	}
}

// TestMix removes pages while others are faulted, prefetched and filled in.
func TestMix(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 2048, 4, nil)
	vm := f.vm("a")
	vm.WorkingSet, vm.Budget, vm.Threads = f.dir+"/set", 1<<30, 3
	var set []uint32
	for _, i := range rand.Perm(2048)[:1000] {
		set = append(set, uint32(i))
	}
	if err := WriteWorkingSet(vm.WorkingSet, set); err != nil {
		t.Fatal(err)
	}
	f.monitor(t, vm, "mix", 6, false).succeeds(t)
	if st := f.ends(t, "a"); st.Reason != "" {
		t.Errorf("ended: %s", st.Reason)
	}
}

// barrier stops the first who comes to a place.
type barrier struct {
	place            string
	first            atomic.Bool
	reached, release chan struct{}
}

func newBarrier(place string) *barrier {
	return &barrier{place: place, reached: make(chan struct{}), release: make(chan struct{})}
}

func (b *barrier) hook(place string) {
	if place == b.place && b.first.CompareAndSwap(false, true) {
		close(b.reached)
		<-b.release
	}
}

// TestRaces stops a prefetch at a place and does something to the page meanwhile.
func TestRaces(t *testing.T) {
	t.Parallel()
	const page = 5
	for _, c := range []struct {
		name, place string
		between     func(*testing.T, *fixture, *testMonitor)
		want        string // the page's first byte afterwards; "" for the image's
	}{
		{"removed before it is looked up", "fill", remove, "0"},
		{"removed after it is read", "loaded", remove, "0"},
		{"removed while it is put in", "put", removeHeld, "0"},
		{"faulted after it is read", "loaded", func(t *testing.T, f *fixture, m *testMonitor) {
			if got := m.ask(t, "read %d", page); got != fmt.Sprint(f.data[page*4096]) {
				t.Errorf("the page reads %s", got)
			}
		}, ""},
		{"written after it is read", "loaded", func(t *testing.T, _ *fixture, m *testMonitor) { m.ask(t, "write %d", page) }, "255"},
		{"written and removed after it is read", "loaded", func(t *testing.T, f *fixture, m *testMonitor) {
			m.ask(t, "write %d", page)
			remove(t, f, m)
		}, "0"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			b := newBarrier(c.place)
			var once sync.Once
			release := func() { once.Do(func() { close(b.release) }) }
			f := newFixture(t, 16, 1, b.hook)
			f.data[page*4096] = 77
			f.rewrite(t)
			vm := f.vm("a")
			vm.WorkingSet = f.dir + "/set"
			if err := WriteWorkingSet(vm.WorkingSet, []uint32{page}); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(release)
			m := f.monitor(t, vm, "script", 2, false)
			<-b.reached
			c.between(t, f, m)
			release()
			if c.place == "put" {
				if got := m.line(t); got != "removed" {
					t.Errorf("the child says %q", got)
				}
			}
			want := c.want
			if want == "" {
				want = fmt.Sprint(f.data[page*4096])
			}
			for range 3 {
				if got := m.ask(t, "read %d", page); got != want {
					t.Errorf("the page reads %s, want %s", got, want)
				}
			}
			m.succeeds(t)
			if st := f.ends(t, "a"); st.Reason != "" {
				t.Errorf("ended: %s", st.Reason)
			}
		})
	}
}

func remove(t *testing.T, _ *fixture, m *testMonitor) {
	t.Helper()
	if got := m.ask(t, "remove 5"); got != "removed" {
		t.Errorf("the child says %q", got)
	}
}

// removeHeld has the event of a removal wait, so that the kernel refuses to put
// pages in.
func removeHeld(t *testing.T, f *fixture, m *testMonitor) {
	t.Helper()
	m.say(t, "remove 5")
	f.pager.mu.Lock()
	a := f.pager.vms["a"]
	f.pager.mu.Unlock()
	a.mu.Lock()
	fd := a.server.uffd.fd
	a.mu.Unlock()
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000); err != nil {
		t.Error(err)
	}
}

// TestKilledClients ends monitors in the middle; the pager goes on.
func TestKilledClients(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 4096, 3, nil)
	for n := range 8 {
		vm := f.vm(fmt.Sprint("vm", n))
		vm.Around, vm.Budget = 4096, 1<<30
		m := f.monitor(t, vm, "touch", 4, false)
		if err := m.cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = m.cmd.Wait()
		if st := f.ends(t, vm.ID); st.Reason != "" {
			t.Errorf("ended: %s", st.Reason)
		}
		if _, err := f.client.Remove(t.Context(), vm.ID); err != nil {
			t.Error(err)
		}
	}
	f.monitor(t, f.vm("last"), "touch", 4, false).succeeds(t)
}

// TestDamage ends a virtual machine whose memory is not what was written.
func TestDamage(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 64, 1, nil)
	layers, err := filepath.Glob(f.image + "/*.layer")
	if err != nil || len(layers) != 1 {
		t.Fatal(layers, err)
	}
	l, err := os.OpenFile(layers[0], os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if _, err := l.WriteAt([]byte{0xfe}, 20*4096+1); err != nil {
		t.Fatal(err)
	}
	vm := f.vm("a")
	vm.ReasonFile = f.dir + "/reason"
	m := f.monitor(t, vm, "touch", 2, false)
	var exit *exec.ExitError
	if err := m.cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("the monitor ends with %v, want it killed", err)
	}
	// It is there when the monitor has ended, at the latest.
	why, err := os.ReadFile(vm.ReasonFile)
	if st := f.ends(t, "a"); !strings.Contains(st.Reason, "damaged") || string(why) != st.Reason {
		t.Errorf("the reason is %q, and in the file %q (%v)", st.Reason, why, err)
	}
}

// TestImpostor hands over a descriptor that is none of a userfaultfd, and says what
// would have the pager close others'.
func TestImpostor(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 16, 1, nil)
	honest := f.monitor(t, f.vm("a"), "script", 1, false)
	vm := f.vm("b")
	m := f.monitor(t, vm, "impostor", 1, false)
	if err := m.cmd.Wait(); err == nil {
		t.Error("the impostor ends by itself, want it killed")
	}
	if st := f.ends(t, "b"); !strings.Contains(st.Reason, "userfaultfd") {
		t.Errorf("the reason is %q", st.Reason)
	}
	for page := range 16 {
		if got := honest.ask(t, "read %d", page); got != fmt.Sprint(f.data[page*4096]) {
			t.Errorf("page %d of another machine reads %s", page, got)
		}
	}
}

// TestBlocking has a monitor that makes the userfaultfd, which it shares, one that holds
// up who reads it, when the pager has looked whether it is. The machine can be ended all
// the same.
func TestBlocking(t *testing.T) {
	t.Parallel()
	var f *fixture
	block := func(place string) {
		if place != "put" {
			return
		}
		f.pager.mu.Lock()
		a := f.pager.vms["a"]
		f.pager.mu.Unlock()
		a.mu.Lock()
		defer a.mu.Unlock()
		// The flag is of the open file, and so the monitor's too.
		if err := unix.SetNonblock(a.server.uffd.fd, false); err != nil {
			t.Error(err)
		}
	}
	f = newFixture(t, 16, 1, block)
	m := f.monitor(t, f.vm("a"), "script", 1, false)
	m.ask(t, "read 3")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if st, err := f.client.Remove(ctx, "a"); err != nil || st.Faults != 1 || st.Reason == "" {
		t.Errorf("%+v (%v), want it ended after one fault", st, err)
	}
	if err := m.cmd.Wait(); err == nil {
		t.Error("its monitor ends by itself, want it killed")
	}
}

// TestWorkingSet records what is touched, in order, and puts that in by itself.
func TestWorkingSet(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 256, 2, nil)
	vm := f.vm("a")
	vm.WorkingSet, vm.RecordFor = f.dir+"/set", time.Hour
	m := f.monitor(t, vm, "script", 1, false)
	want := []uint32{200, 3, 4, 5, 90, 0}
	for _, page := range want {
		m.ask(t, "read %d", page)
	}
	m.ask(t, "read 3")
	if err := f.client.FinishRecording(t.Context(), "a"); err != nil {
		t.Fatal(err)
	}
	m.ask(t, "read 17")
	m.succeeds(t)
	f.ends(t, "a")
	got, err := ReadWorkingSet(vm.WorkingSet)
	if err != nil || !slices.Equal(got, want) {
		t.Fatalf("recorded %v (%v), want %v", got, err, want)
	}
	vm.ID, vm.Socket = "b", f.dir+"/b.sock"
	m = f.monitor(t, vm, "script", 1, false)
	for st := (Status{}); st.Prefetched == 0; {
		if st, err = f.client.Status(t.Context(), "b"); err != nil || st.State == StateEnded {
			t.Fatalf("%+v (%v)", st, err)
		}
	}
	for _, page := range want {
		if got := m.ask(t, "read %d", page); got != fmt.Sprint(f.data[page*4096]) {
			t.Errorf("page %d reads %s", page, got)
		}
	}
	m.succeeds(t)
	if st := f.ends(t, "b"); st.Faults != 0 || st.Copied+st.Zeroed != int64(len(want))*4096 {
		t.Errorf("%+v, want the recorded pages put in, and no fault", st)
	}
	if err := os.Truncate(vm.WorkingSet, 20); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadWorkingSet(vm.WorkingSet); !errors.Is(err, memory.ErrDamaged) {
		t.Errorf("cut off: %v", err)
	}
}

// TestHugePages serves pages of 2 MiB.
func TestHugePages(t *testing.T) {
	t.Parallel()
	free, err := os.ReadFile("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
	if n := 0; err != nil || func() bool { _, err := fmt.Sscan(string(free), &n); return err != nil || n < 4 }() {
		t.Skip("fewer than 4 huge pages are free: sysctl -w vm.nr_hugepages=4")
	}
	f := newFixture(t, 4*512, 3, nil)
	f.monitor(t, f.vm("a"), "touch", 3, true).succeeds(t)
	if st := f.ends(t, "a"); st.Reason != "" || st.Copied != int64(len(f.data)) {
		t.Errorf("%+v, want every page put in once", st)
	}
}

// TestProtocol registers, lists and removes, also from a second agent.
func TestProtocol(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 16, 1, nil)
	ctx := t.Context()
	vm := f.vm("a")
	m := f.monitor(t, vm, "script", 1, false)
	if err := f.client.Register(ctx, vm); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("registered twice: %v", err)
	}
	if err := f.client.Register(ctx, VM{ID: "b"}); !errors.Is(err, sandbox.ErrInvalid) {
		t.Errorf("registered without an image: %v", err)
	}
	if _, err := f.client.Status(ctx, "b"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("status of what is not there: %v", err)
	}
	f.client.Close()
	again, err := Dial(ctx, f.dir+"/pager")
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if got := m.ask(t, "read 1"); got != fmt.Sprint(f.data[4096]) {
		t.Errorf("the page reads %s", got)
	}
	all, err := again.List(ctx)
	if err != nil || len(all) != 1 || all[0].State != StateServed || all[0].Monitor.PID != m.cmd.Process.Pid {
		t.Errorf("%+v (%v), want one that is served", all, err)
	}
	st, err := again.Remove(ctx, "a")
	if err != nil || st.State != StateEnded || st.Reason == "" {
		t.Errorf("removed: %+v (%v)", st, err)
	}
	if err := m.cmd.Wait(); err == nil {
		t.Error("the monitor ends by itself, want it killed")
	}
	if err := Serve(ctx, f.dir+"/pager", slog.New(slog.DiscardHandler), func() {}); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("a second pager: %v", err)
	}
}

// TestOrphans ends monitors whose pager was killed when the next one starts.
func TestOrphans(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 16, 1, nil)
	vm := f.vm("a")
	vm.ReasonFile = f.dir + "/reason"
	m := f.monitor(t, vm, "script", 1, false)
	m.ask(t, "read 1")
	// What a pager that was killed leaves behind.
	list, err := os.ReadFile(monitorsFile(f.dir + "/pager"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(monitorsFile(f.dir+"/next"), list, 0o600); err != nil {
		t.Fatal(err)
	}
	next := &Pager{log: f.pager.log, vms: map[string]*attachment{}}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	if err := next.serve(ctx, f.dir+"/next", cancel); err != nil {
		t.Fatal(err)
	}
	var exit *exec.ExitError
	if err := m.cmd.Wait(); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("the monitor ends with %v, want it killed", err)
	}
	if why, err := os.ReadFile(vm.ReasonFile); err != nil || string(why) != "its pager was killed" {
		t.Errorf("the reason is %q (%v)", why, err)
	}
}

// TestDrop forgets a virtual machine at a pager that may know nothing of it, or not
// be there.
func TestDrop(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 16, 1, nil)
	if err := f.client.Register(t.Context(), f.vm("a")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Drop(t.Context(), f.dir+"/pager", "a"); err != nil {
			t.Error(err)
		}
	}
	if all, err := f.client.List(t.Context()); err != nil || len(all) != 0 {
		t.Errorf("there is %+v (%v)", all, err)
	}
	if err := Drop(t.Context(), f.dir+"/nobody", "a"); err != nil {
		t.Error(err)
	}
}
