package pager

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/memory/pager/pagertest"
)

// childEnv has the order of a child: this binary, that does with its memory what a
// monitor does.
const childEnv = "WRENN_PAGER_TEST_CHILD"

type childOrder struct {
	Mode    string
	Socket  string
	Memory  string // file with what the memory has to be
	Size    int
	Threads int
	Huge    bool
}

// runOnKVM is set where there is a guest for the processor.
var runOnKVM func(o childOrder, mem []byte) error

func TestMain(m *testing.M) {
	if order := os.Getenv(childEnv); order != "" {
		var o childOrder
		err := json.Unmarshal([]byte(order), &o)
		if err == nil {
			err = o.run()
		}
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func (o childOrder) run() error {
	if o.Mode == "earlier" {
		p := newPager(slog.New(slog.NewTextHandler(os.Stderr, nil)))
		p.version = 1
		return p.serve(context.Background(), o.Socket, func() { PrintReady(os.Stdout) })
	}
	if o.Mode == "pager" {
		return Serve(context.Background(), o.Socket, slog.New(slog.NewTextHandler(os.Stderr, nil)), func() { PrintReady(os.Stdout) })
	}
	if o.Mode == "agent" {
		if err := os.Remove(o.Memory); err != nil {
			return err
		}
		o.Mode = "pager"
		order, err := json.Marshal(o)
		if err != nil {
			return err
		}
		if err := os.Setenv(childEnv, string(order)); err != nil {
			return err
		}
		c, err := Start(context.Background(), o.Socket, []string{Self}, nil)
		if err == nil {
			err = c.Close()
		}
		return err
	}
	debug.SetGCPercent(-1) // it would wait for threads that wait for pages
	runtime.GOMAXPROCS(o.Threads + 2)
	m, err := pagertest.Map(o.Size, o.Huge)
	if err != nil {
		return err
	}
	if o.Mode == "impostor" {
		if m.FD, err = madeUpEvents(); err != nil {
			return err
		}
		fmt.Println("ready") // it may be ended as soon as it connects
	}
	// A monitor has a short path of its own in its jail.
	if err := os.Chdir(filepath.Dir(o.Socket)); err != nil {
		return err
	}
	if err := m.Connect(filepath.Base(o.Socket)); err != nil {
		return err
	}
	mem := m.Bytes
	if o.Mode != "impostor" {
		fmt.Println("ready")
	}
	switch o.Mode {
	case "touch":
		return o.touch(mem)
	case "mix":
		return o.mix(mem)
	case "kvm":
		return runOnKVM(o, mem)
	}
	return o.script(mem)
}

// madeUpEvents is a pipe from which events of forks are read, each with one of the
// first descriptors as that of the child.
func madeUpEvents() (int, error) {
	var ends [2]int
	if err := unix.Pipe(ends[:]); err != nil {
		return 0, err
	}
	for fd := range uint64(64) {
		e := make([]byte, eventSize)
		e[0] = eventFork
		binary.NativeEndian.PutUint64(e[8:], fd)
		if _, err := unix.Write(ends[1], e); err != nil {
			return 0, err
		}
	}
	return ends[0], nil
}

func (o childOrder) each(f func(thread int) error) error {
	errs := make([]error, o.Threads)
	var wg sync.WaitGroup
	for i := range o.Threads {
		wg.Go(func() { errs[i] = f(i) })
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// touch compares all pages from many threads, all in orders of their own.
func (o childOrder) touch(mem []byte) error {
	want, err := os.ReadFile(o.Memory)
	if err != nil {
		return err
	}
	return o.each(func(thread int) error {
		for _, i := range rand.New(rand.NewPCG(uint64(thread), 0)).Perm(len(mem) / 4096) {
			if !bytes.Equal(mem[i*4096:][:4096], want[i*4096:][:4096]) {
				return fmt.Errorf("thread %d: page %d is wrong", thread, i)
			}
		}
		return nil
	})
}

// mix reads, writes and removes pages. Each thread has its own and knows what must
// be in them.
func (o childOrder) mix(mem []byte) error {
	want, err := os.ReadFile(o.Memory)
	if err != nil {
		return err
	}
	pages := len(mem) / 4096
	return o.each(func(thread int) error {
		rnd := rand.New(rand.NewPCG(uint64(thread), 7))
		for n := range 4000 {
			i := rnd.IntN(pages/o.Threads)*o.Threads + thread
			page, must := mem[i*4096:][:4096], want[i*4096:][:4096]
			switch rnd.IntN(4) {
			case 0:
				if err := unix.Madvise(page, unix.MADV_DONTNEED); err != nil {
					return err
				}
				clear(must)
			case 1:
				page[n%4096]++
				must[n%4096]++
			}
			if !bytes.Equal(page, must) {
				return fmt.Errorf("thread %d: page %d is wrong after %d steps", thread, i, n)
			}
		}
		return nil
	})
}

// script does what its standard input says, a line each: to read the first byte of
// a page, to write it, or to remove a page.
func (o childOrder) script(mem []byte) error {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() {
		var (
			op   string
			page int
		)
		if _, err := fmt.Sscan(lines.Text(), &op, &page); err != nil {
			return err
		}
		p := mem[page*4096:][:4096]
		switch op {
		case "read":
			fmt.Println(p[0])
		case "write":
			p[0] = 255
			fmt.Println("written")
		case "remove":
			if err := unix.Madvise(p, unix.MADV_DONTNEED); err != nil {
				return err
			}
			fmt.Println("removed")
		}
	}
	return nil
}
