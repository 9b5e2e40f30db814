package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/memory/pager/pagertest"
)

// memoryOrder is what a process that plays a monitor has to do, memoryAnswer what
// came of it.
type memoryOrder struct {
	Mode    string // "touch", "bare", "serve", "hold", "dirty"
	Socket  string // of the pager; "serve": to listen at
	File    string // "bare", "serve": with the bytes; "dirty": what the memory is private over
	Around  int    // "serve": bytes that a fault puts in
	Size    int
	Threads int   // that touch
	Pages   []int // to touch, in this order; a thread takes every Threads-th
}

type memoryAnswer struct {
	Took    time.Duration
	Waits   []time.Duration // of each page
	Address uintptr         // of the memory
}

// ServeMemoryChild plays a monitor: its order is a line of in, its answer one of
// out. It goes on until in ends.
func ServeMemoryChild(in io.Reader, out io.Writer) error {
	var o memoryOrder
	dec := json.NewDecoder(in)
	if err := dec.Decode(&o); err != nil {
		return fmt.Errorf("read order: %w", err)
	}
	debug.SetGCPercent(-1) // it would wait for threads that wait for pages
	runtime.GOMAXPROCS(max(o.Threads+1, 2))
	a, err := o.run()
	if err != nil {
		return err
	}
	if err := json.NewEncoder(out).Encode(a); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, in)
	return err
}

func (o memoryOrder) run() (memoryAnswer, error) {
	switch o.Mode {
	case "dirty":
		return o.dirty()
	case "serve":
		return memoryAnswer{}, o.serve()
	}
	m, err := pagertest.Map(o.Size, false)
	if err != nil {
		return memoryAnswer{}, err
	}
	if o.Mode == "bare" {
		return o.bare(m)
	}
	if err := m.Connect(o.Socket); err != nil || o.Mode == "hold" {
		return memoryAnswer{}, err
	}
	return o.touch(m.Bytes), nil
}

// touch reads a byte of each page.
func (o memoryOrder) touch(mem []byte) memoryAnswer {
	a := memoryAnswer{Waits: make([]time.Duration, len(o.Pages))}
	sums := make([]int, o.Threads) // keeps the reads
	var wg sync.WaitGroup
	begin := time.Now()
	for t := range o.Threads {
		wg.Go(func() {
			runtime.LockOSThread()
			sum := 0
			last := time.Now()
			for i := t; i < len(o.Pages); i += o.Threads {
				sum += int(mem[o.Pages[i]*4096])
				now := time.Now()
				a.Waits[i] = now.Sub(last)
				last = now
			}
			sums[t] = sum
		})
	}
	wg.Wait()
	a.Took = time.Since(begin)
	runtime.KeepAlive(sums)
	return a
}

// bare puts the pages in itself, one after the other, from the page cache.
func (o memoryOrder) bare(m *pagertest.Memory) (memoryAnswer, error) {
	from, err := o.mapFile()
	if err != nil {
		return memoryAnswer{}, err
	}
	begin := time.Now()
	for _, p := range o.Pages {
		if err := m.Copy(p*4096, from[p*4096:][:4096]); err != nil {
			return memoryAnswer{}, fmt.Errorf("put page in: %w", err)
		}
	}
	return memoryAnswer{Took: time.Since(begin)}, nil
}

// serve serves the faults of another child.
func (o memoryOrder) serve() error {
	from, err := o.mapFile()
	if err != nil {
		return err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: o.Socket, Net: "unix"})
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	go func() { // as long as the process
		runtime.LockOSThread()
		if err := pagertest.Serve(l, from, o.Around); !errors.Is(err, unix.ESRCH) { // the other has ended
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}()
	return nil
}

// mapFile has all of the file in memory.
func (o memoryOrder) mapFile() ([]byte, error) {
	f, err := os.Open(o.File)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	from, err := unix.Mmap(int(f.Fd()), 0, o.Size, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map file: %w", err)
	}
	return from, nil
}

// dirty holds memory that is private over a file, and of which it has written
// pages.
func (o memoryOrder) dirty() (memoryAnswer, error) {
	f, err := os.Open(o.File)
	if err != nil {
		return memoryAnswer{}, err
	}
	defer f.Close()
	mem, err := unix.Mmap(int(f.Fd()), 0, o.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_NORESERVE)
	if err != nil {
		return memoryAnswer{}, fmt.Errorf("map file: %w", err)
	}
	rnd := rand.NewChaCha8([32]byte{})
	for _, p := range o.Pages {
		_, _ = rnd.Read(mem[p*4096:][:4096]) // never fails
	}
	return memoryAnswer{Address: uintptr(unsafe.Pointer(&mem[0]))}, nil
}
