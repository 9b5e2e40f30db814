package pager

import (
	"context"
	"errors"
	"iter"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// TestBudget turns away the virtual machine that the pager has no memory left for, and
// takes it when another one is gone.
func TestBudget(t *testing.T) {
	t.Parallel()
	f := newFixture(t, 64, 2, nil)
	m := f.monitor(t, f.vm("a"), "script", 1, false)
	b := f.pager.budget
	b.mu.Lock()
	one := b.taken
	b.limit = one + one/2 + b.shared()
	b.mu.Unlock()
	if one <= 0 {
		t.Fatalf("a virtual machine takes %d bytes", one)
	}
	vm := f.vm("b")
	if err := f.client.Register(t.Context(), vm); !errors.Is(err, sandbox.ErrExhausted) {
		t.Fatalf("a second one: %v", err)
	}
	if _, err := os.Stat(vm.Socket); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its socket: %v", err)
	}
	m.ask(t, "read 3")
	m.succeeds(t)
	f.ends(t, "a")
	m = f.monitor(t, vm, "script", 1, false)
	m.ask(t, "read 3")
	m.succeeds(t)
	f.ends(t, "b")
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.taken != 0 {
		t.Errorf("%d bytes are taken by nobody", b.taken)
	}
}

// TestRecorderBudget keeps of a working set what there is memory for.
func TestRecorderBudget(t *testing.T) {
	t.Parallel()
	const pages = growBy + 100
	f := newFixture(t, pages, 1, nil)
	vm := f.vm("a")
	vm.WorkingSet, vm.RecordFor, vm.Around = f.dir+"/set", time.Hour, 4096
	b := f.pager.budget
	m := f.monitor(t, vm, "script", 1, false)
	m.ask(t, "read %d", pages-1)
	b.mu.Lock()
	b.limit = 0
	b.mu.Unlock()
	for page := range pages - 1 {
		m.ask(t, "read %d", page)
	}
	m.succeeds(t)
	f.ends(t, "a")
	blocks, err := ReadWorkingSet(vm.WorkingSet)
	if err != nil || len(blocks) != growBy || blocks[0] != pages-1 || blocks[growBy-1] != growBy-2 {
		t.Errorf("%d pages are recorded (%v), want the first %d", len(blocks), err, growBy)
	}
	if b.taken != 0 {
		t.Errorf("%d bytes are taken by nobody", b.taken)
	}
}

// everySecond is a memory of which every second page is not zero.
type everySecond int64

func (s everySecond) Dirty(context.Context) iter.Seq2[memory.Range, error] {
	return func(yield func(memory.Range, error) bool) { yield(memory.Range{Length: int64(s)}, nil) }
}

func (s everySecond) Read(_ context.Context, p []byte, ranges []memory.Range) error {
	clear(p)
	for _, r := range ranges {
		for at := r.Offset; at < r.Offset+r.Length; at += 4096 {
			if at/4096%2 == 0 {
				p[0] = 1
			}
			p = p[4096:]
		}
	}
	return nil
}

// TestFootprint compares what virtual machines are said to take with what they do, at the
// worst image there is.
func TestFootprint(t *testing.T) {
	const size, machines = 256 << 20, 20
	dir := t.TempDir()
	p := newPager(slog.New(slog.DiscardHandler))
	heap := func() int64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	var all []*attachment
	defer func() {
		for _, a := range all {
			a.listener.Close()
			a.image.Close()
		}
	}()
	before := heap()
	for i := range machines {
		image := filepath.Join(dir, string(rune('a'+i/4))) // four have one image
		if i%4 == 0 {
			if err := os.Mkdir(image, 0o700); err != nil {
				t.Fatal(err)
			}
			if err := memory.Write(t.Context(), image, size, nil, everySecond(size)); err != nil {
				t.Fatal(err)
			}
		}
		a, err := p.attach(VM{ID: "x", Image: image, Socket: image + string(rune('0'+i%4))})
		if err != nil {
			t.Fatal(err)
		}
		g := newGuest(a.image, &monitor{page: 4096}, nil)
		buffers := [][]byte{make([]byte, sequential), make([]byte, sequential), make([]byte, sequential)}
		if _, _, err := g.load(4096, 4096, buffers[0]); err != nil { // the checksums are there from now on
			t.Fatal(err)
		}
		a.server = &server{guest: g, jobs: make(chan event, eventsAtOnce)}
		a.hook = func(string) { runtime.KeepAlive(buffers) }
		all = append(all, a)
	}
	took, said := heap()-before, p.budget.taken+p.checks.Size()
	t.Logf("%d machines of %d MiB take %d KiB each, and are said to take %d", machines, size>>20, took/machines>>10, said/machines>>10)
	if took > said || took < said/2 {
		t.Errorf("they take %d bytes, and are said to take %d", took, said)
	}
	runtime.KeepAlive(all)
}
