package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/memory/pager"
)

// MemoryOptions say what Memory measures.
type MemoryOptions struct {
	Dir      string   // where its files are made: on the disk that images go to
	Pager    []string // command of the pager; the socket is added to it
	Child    []string // command that calls ServeMemoryChild
	Samples  int
	SizeMiB  int // of the memory whose faults are served
	PauseMiB int // of the memory that is written
}

// Parts of a memory that are dirty, and that are in a working set.
const (
	dirtyPercent = 5
	setPart      = 8 // one page of as many
)

// memoryBench is one run of Memory and what it holds.
type memoryBench struct {
	MemoryOptions
	dir    string
	size   int
	image  string // its only layer is nothing but the memory, in order
	layer  string
	client *pager.Client
	vms    int

	results []Result
}

// Memory measures memory images and the pager, without a virtual machine: a process
// that maps memory and touches it does what one does.
func Memory(ctx context.Context, o MemoryOptions) (_ Report, err error) {
	r := Report{Bench: "memory", Host: thisHost("none")}
	if o.Dir, err = filepath.Abs(o.Dir); err != nil {
		return r, fmt.Errorf("find directory: %w", err)
	}
	b := &memoryBench{MemoryOptions: o, size: o.SizeMiB * mebibyte}
	if b.dir, err = os.MkdirTemp(o.Dir, "wrenn-bench-"); err != nil {
		return r, fmt.Errorf("make directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	b.measureZeroScan()
	if err := b.makeImage(ctx); err != nil {
		return r, fmt.Errorf("make image: %w", err)
	}
	stop, err := b.startPager(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, stop()) }()
	for _, part := range []struct {
		name    string
		measure func(context.Context) error
	}{
		{"page faults", b.measureFaults},
		{"working set", b.measureWorkingSet},
		{"pause", b.measurePause},
		{"chain of pauses", b.measureChain},
	} {
		progress("memory: %s", part.name)
		if err := part.measure(ctx); err != nil {
			return r, fmt.Errorf("measure %s: %w", part.name, err)
		}
	}
	r.Results = b.results
	return r, nil
}

func (b *memoryBench) report(results ...Result) { b.results = append(b.results, results...) }

// measureZeroScan looks for zero pages in memory that is all zero, which takes
// longest, and much larger than a cache.
func (b *memoryBench) measureZeroScan() {
	p := make([]byte, 256*mebibyte)
	for i := 0; i < len(p); i += 4096 {
		p[i] = 0 // has the page
	}
	var speed samples
	for range b.Samples {
		begin := time.Now()
		n := memory.CountZero(p)
		speed = append(speed, float64(n)*4096/1e9/time.Since(begin).Seconds())
	}
	r := speed.result("zero-page scan, one core", "GB/s")
	b.report(r.want("≥ 5", r.P50 >= 5))
}

// makeImage writes an image of one layer that has no zero page.
func (b *memoryBench) makeImage(ctx context.Context) error {
	data := make([]byte, b.size)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(data) // never fails
	f, err := os.CreateTemp(b.dir, "data-")
	if err != nil {
		return err
	}
	defer f.Close()
	defer os.Remove(f.Name())
	if _, err := f.Write(data); err != nil {
		return err
	}
	b.image = filepath.Join(b.dir, "image")
	if err := os.Mkdir(b.image, 0o700); err != nil {
		return err
	}
	if err := memory.Write(ctx, b.image, int64(b.size), nil, memory.SparseFile{File: f, Size: int64(b.size)}); err != nil {
		return err
	}
	b.layer, err = newest(filepath.Join(b.image, "*.layer"))
	return err
}

// startPager starts the pager and connects to it.
func (b *memoryBench) startPager(ctx context.Context) (stop func() error, err error) {
	socket := filepath.Join(b.dir, "pager.sock")
	end := func(c *exec.Cmd) error { return c.Process.Signal(syscall.SIGTERM) }
	c := newChild(ctx, end, b.Pager[0], append(b.Pager[1:len(b.Pager):len(b.Pager)], socket)...)
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start pager: %w", err)
	}
	defer r.Close()
	c.cmd.Stdout = w
	err = c.start()
	w.Close()
	if err != nil {
		return nil, fmt.Errorf("start pager: %w", err)
	}
	_, err = r.Read(make([]byte, 64)) // it is ready, or has ended
	if err == nil {
		b.client, err = pager.Dial(ctx, socket)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("start pager: %w", err), c.stop())
	}
	return func() error {
		b.client.Close()
		return c.stop()
	}, nil
}

// child runs a process that plays a monitor; done ends it.
func (b *memoryBench) child(ctx context.Context, o memoryOrder) (a memoryAnswer, done func() error, c *pipedChild, err error) {
	order, err := json.Marshal(o)
	if err != nil {
		return a, nil, nil, err
	}
	c, line, err := startPiped(ctx, append(order, '\n'), b.Child)
	if err != nil {
		return a, nil, nil, err
	}
	done = func() error {
		_, err := c.stop()
		return err
	}
	if err := json.Unmarshal([]byte(line), &a); err != nil {
		return a, nil, nil, errors.Join(fmt.Errorf("read answer of child: %w", err), done())
	}
	return a, done, c, nil
}

// bare is the floor of page faults.
func (b *memoryBench) bare(ctx context.Context, pages []int) (time.Duration, error) {
	a, done, _, err := b.child(ctx, memoryOrder{Mode: "bare", File: b.layer, Size: b.size, Pages: pages})
	if err != nil {
		return 0, err
	}
	return a.Took, done()
}

// loop is what faults cost with next to no pager: a process that does nothing but put
// in, from memory, what is touched.
func (b *memoryBench) loop(ctx context.Context, around int, pages []int) (_ time.Duration, err error) {
	socket := filepath.Join(b.dir, "loop.sock")
	defer os.Remove(socket)
	_, end, _, err := b.child(ctx, memoryOrder{Mode: "serve", Socket: socket, File: b.layer, Size: b.size, Around: around})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, end()) }()
	a, done, _, err := b.child(ctx, memoryOrder{Mode: "touch", Socket: socket, Size: b.size, Threads: 1, Pages: pages})
	if err != nil {
		return 0, err
	}
	return a.Took, done()
}

// touch has the pager serve the pages.
func (b *memoryBench) touch(ctx context.Context, vm pager.VM, threads int, pages []int) (memoryAnswer, error) {
	b.vms++
	vm.ID = fmt.Sprint("vm", b.vms)
	vm.Image, vm.Socket = b.image, filepath.Join(b.dir, vm.ID+".sock")
	if err := b.client.Register(ctx, vm); err != nil {
		return memoryAnswer{}, err
	}
	a, done, _, err := b.child(ctx, memoryOrder{Mode: "touch", Socket: vm.Socket, Size: b.size, Threads: threads, Pages: pages})
	if err != nil {
		return a, err
	}
	if err := done(); err != nil {
		return a, err
	}
	st, err := b.client.Remove(ctx, vm.ID)
	if err == nil && st.Reason != "" {
		err = errors.New(st.Reason)
	}
	return a, err
}

// faultKind is one way in which pages are touched.
type faultKind struct {
	metric  string
	threads int // that touch, and of the pager
	around  int64
	piece   int // that a bare loop puts in at once
	random  bool
	atMost  float64 // goal: ratio to the floor; 0 for none
	note    string

	took, waits, loop samples
}

// measureFaults touches every page once. The floor puts the same pages in without
// any fault.
func (b *memoryBench) measureFaults(ctx context.Context) error {
	kinds := []*faultKind{
		{metric: "random pages", threads: 1, piece: 64 << 10, random: true, atMost: 1 / 0.6, note: "as virtual machines are served: a fault brings up to 64 KiB"},
		{metric: "random pages, two threads", threads: 2, random: true},
		{metric: "sequential pages", threads: 1, piece: 256 << 10, atMost: 1 / 0.8},
		{metric: "random pages, a fault each", threads: 1, around: 4096, piece: 4096, random: true, atMost: 1 / 0.6, note: "while a working set is recorded; the floor has no faults"},
		{metric: "random pages, a fault each, two threads", threads: 2, around: 4096, random: true},
	}
	inOrder := make([]int, b.size/4096)
	for i := range inOrder {
		inOrder[i] = i
	}
	floors := map[bool]*samples{false: {}, true: {}}
	perPage := func(d time.Duration) float64 { return float64(d) / 1e3 / float64(len(inOrder)) }
	for range b.Samples {
		shuffled := rand.Perm(len(inOrder))
		order := map[bool][]int{false: inOrder, true: shuffled}
		for random, s := range floors {
			d, err := b.bare(ctx, order[random])
			if err != nil {
				return err
			}
			*s = append(*s, perPage(d))
		}
		for _, k := range kinds {
			a, err := b.touch(ctx, pager.VM{Around: k.around, Threads: k.threads}, k.threads, order[k.random])
			if err != nil {
				return err
			}
			k.took = append(k.took, perPage(a.Took))
			if k.threads == 1 {
				d, err := b.loop(ctx, k.piece, order[k.random])
				if err != nil {
					return err
				}
				k.loop = append(k.loop, perPage(d))
			}
			for i := 0; i < len(a.Waits); i += 61 { // enough of them, and at no step of the pager
				k.waits = append(k.waits, float64(a.Waits[i])/1e3)
			}
		}
	}
	for i, k := range kinds {
		r := k.took.result(k.metric, "µs per page").against(*floors[k.random], k.atMost)
		if k.atMost == 0 {
			r = k.took.result(k.metric, "µs per page").noted("%.2f times as fast as with one thread", kinds[i-1].took.quantile(.5)/k.took.quantile(.5))
			r.FloorP50 = round(floors[k.random].quantile(.5))
			r.Ratio = round(r.P50 / r.FloorP50)
		} else {
			r = r.noted("%.0f pages/s; %s", 1e6/r.P50, k.note)
		}
		b.report(r, k.waits.result(k.metric+": wait", "µs"))
		if len(k.loop) > 0 {
			r := k.loop.result(k.metric+": a bare loop", "µs per page")
			b.report(r.noted("the least that such faults take: served by another process, %d KiB each, of nothing but system calls", k.piece>>10))
		}
	}
	return nil
}

// measureWorkingSet has the pager put a recorded working set in, beside reading the
// same bytes in the same order from the file.
func (b *memoryBench) measureWorkingSet(ctx context.Context) error {
	var set []uint32
	for at := 0; len(set) < b.size/4096/setPart; at = (at + 1 + rand.IntN(3*setPart)) % (b.size / 4096) {
		set = append(set, uint32(at))
	}
	rand.Shuffle(len(set)/16, func(i, j int) { // in groups, as programs touch it
		for n := range 16 {
			set[i*16+n], set[j*16+n] = set[j*16+n], set[i*16+n]
		}
	})
	path := filepath.Join(b.dir, "set")
	if err := pager.WriteWorkingSet(path, set); err != nil {
		return err
	}
	var pages []int // of the set, each once
	seen := map[uint32]bool{}
	for _, n := range set {
		if !seen[n] {
			seen[n] = true
			pages = append(pages, int(n))
		}
	}
	for _, cold := range []bool{true, false} {
		var took, floor, put samples
		for range b.Samples {
			if err := b.cache(cold); err != nil {
				return err
			}
			d, err := timed(func() error { return b.readBlocks(set) })
			if err != nil {
				return err
			}
			floor.addMillis(d)
			if err := b.cache(cold); err != nil {
				return err
			}
			if d, err = b.prefetch(ctx, b.image, path); err != nil {
				return err
			}
			took.addMillis(d)
			if cold {
				continue
			}
			if d, err = b.bare(ctx, pages); err != nil {
				return err
			}
			put.addMillis(d)
		}
		name := map[bool]string{true: "from the disk", false: "from the page cache"}[cold]
		b.report(took.result("working set present, "+name, "ms").against(floor, 1.3).noted("%d MiB", len(set)*4096/mebibyte))
		if !cold {
			r := put.result("working set put in by a bare loop", "ms")
			b.report(r.noted("the least that it takes one thread, with nothing to read: UFFDIO_COPY of the same pages"))
		}
	}
	return nil
}

// cache has the image in the page cache, or not.
func (b *memoryBench) cache(cold bool) error {
	f, err := os.Open(b.layer)
	if err != nil {
		return err
	}
	defer f.Close()
	if cold {
		return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED)
	}
	buf := make([]byte, mebibyte)
	for err == nil {
		_, err = f.Read(buf)
	}
	return nil
}

func (b *memoryBench) readBlocks(set []uint32) error {
	f, err := os.Open(b.layer)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := make([]byte, 4096)
	for _, n := range set {
		if _, err := f.ReadAt(buf, int64(n)*4096); err != nil {
			return err
		}
	}
	return nil
}

// prefetch has the pager put a working set in, and says how long that took.
func (b *memoryBench) prefetch(ctx context.Context, image, set string) (time.Duration, error) {
	b.vms++
	vm := pager.VM{ID: fmt.Sprint("vm", b.vms), Image: image, WorkingSet: set, Socket: filepath.Join(b.dir, "set.sock")}
	if err := b.client.Register(ctx, vm); err != nil {
		return 0, err
	}
	_, done, _, err := b.child(ctx, memoryOrder{Mode: "hold", Socket: vm.Socket, Size: b.size})
	if err != nil {
		return 0, err
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for {
		st, err := b.client.Status(ctx, vm.ID)
		if err == nil && st.State == pager.StateEnded {
			err = fmt.Errorf("the pager has let go of it: %s", st.Reason)
		}
		if err != nil {
			return 0, errors.Join(err, done())
		}
		if st.Prefetched > 0 {
			err := done()
			_, rerr := b.client.Remove(ctx, vm.ID)
			return st.Prefetched, errors.Join(err, rerr)
		}
		<-tick.C
	}
}
