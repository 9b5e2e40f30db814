package pager

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/memory"
)

// sequential is how much a fault puts in that goes on where the last one ended.
const sequential = 256 << 10

// errAgain says that the memory is being changed: an event tells of it, which has
// to be read first.
var errAgain = errors.New("memory is being changed")

// errEnded says that the process with the memory is gone.
var errEnded = errors.New("process has ended")

// guest is the memory of a virtual machine that is filled from an image.
type guest struct {
	image *memory.Image
	uffd  uffd
	page  int64
	hook  func(string) // of tests

	// mu is held alone while events are read and noted, and shared while pages are
	// put in. The kernel lets a thread that removes pages go on as soon as its event
	// is read: a page that was looked up before and is put in after would come back.
	mu      sync.RWMutex
	regions []region // where the memory is now
	removed bitmap   // pages that are zero, whatever the image has
	present bitmap   // pages that were put in, to save asking the kernel

	next atomic.Int64 // where the last window of a fault ended

	copied, zeroed, served atomic.Int64 // bytes, and page faults
}

func newGuest(image *memory.Image, m *monitor, hook func(string)) *guest {
	pages := (image.Size() + m.page - 1) / m.page
	if hook == nil {
		hook = func(string) {}
	}
	return &guest{
		image: image, uffd: uffd{m.fd}, page: m.page, hook: hook,
		regions: append([]region(nil), m.regions...), removed: newBitmap(pages), present: newBitmap(pages),
	}
}

// note takes an event that is no fault into account. mu is held alone.
func (g *guest) note(e event) {
	switch e.kind {
	case eventRemove:
		g.each(e.a, e.b, func(page int64) {
			g.removed.set(page)
			g.present.clear(page)
		})
	case eventUnmap:
		g.each(e.a, e.b, func(page int64) { g.present.clear(page) })
		g.cut(e.a, e.b)
	case eventRemap:
		g.remap(e.a, e.b, e.c)
	case eventFork:
		// Reading it has made a descriptor, for the memory of a child. It is not a
		// virtual machine's.
		unix.Close(int(uint32(e.a)))
	}
}

// each calls f for the pages of the memory at these addresses.
func (g *guest) each(start, end uint64, f func(page int64)) {
	for _, r := range g.regions {
		from, to := max(start, r.Base), min(end, r.Base+r.Size)
		for at := from; at < to; at += uint64(g.page) {
			f(int64(r.Offset+at-r.Base) / g.page)
		}
	}
}

// cut takes addresses out of the regions and returns what was there.
func (g *guest) cut(start, end uint64) (out []region) {
	var kept []region
	for _, r := range g.regions {
		from, to := max(start, r.Base), min(end, r.Base+r.Size)
		if from >= to {
			kept = append(kept, r)
			continue
		}
		if from > r.Base {
			kept = append(kept, region{Base: r.Base, Size: from - r.Base, Offset: r.Offset})
		}
		if to < r.Base+r.Size {
			kept = append(kept, region{Base: to, Size: r.Base + r.Size - to, Offset: r.Offset + to - r.Base})
		}
		out = append(out, region{Base: from, Size: to - from, Offset: r.Offset + from - r.Base})
	}
	g.regions = kept
	return out
}

func (g *guest) remap(from, to, length uint64) {
	moved := g.cut(from, from+length)
	g.cut(to, to+length)
	for _, r := range moved {
		r.Base += to - from
		g.regions = append(g.regions, r)
	}
}

// offset is which byte of the memory is at an address.
func (g *guest) offset(address uint64) (int64, bool) {
	for _, r := range g.regions {
		if address >= r.Base && address-r.Base < r.Size {
			return int64(r.Offset + address - r.Base), true
		}
	}
	return 0, false
}

// address is where a byte of the memory is, and how much follows it there.
func (g *guest) address(offset int64) (address uint64, left int64, ok bool) {
	for _, r := range g.regions {
		if o := uint64(offset); o >= r.Offset && o-r.Offset < r.Size {
			return r.Base + o - r.Offset, int64(r.Size - (o - r.Offset)), true
		}
	}
	return 0, 0, false
}

// fault serves a page fault, with the other pages of a window of around bytes: first
// those that follow it, then, with the thread going on, those before. buf has room for
// the window.
func (g *guest) fault(e event, around int64, buf []byte) error {
	at := e.b &^ uint64(g.page-1)
	if e.a&faultWriteProtect != 0 {
		return g.outcome(g.uffd.unprotect(at, int(g.page)))
	}
	g.mu.RLock()
	offset, ok := g.offset(at)
	g.mu.RUnlock()
	if !ok { // it was taken away meanwhile; the thread finds that out itself
		return g.outcome(g.uffd.wake(at, int(g.page)))
	}
	window := max(around, g.page)
	if around > g.page && offset == g.next.Load() { // one after the other
		window = max(window, sequential)
	}
	n, err := g.put(offset, window-offset%window, buf, true)
	g.next.Store(offset + n)
	if n == 0 && err == nil {
		err = g.outcome(g.uffd.wake(at, int(g.page)))
	}
	if err != nil {
		return err
	}
	g.served.Add(1)
	if around > g.page {
		return g.before(offset-offset%window, offset, buf)
	}
	return nil
}

// before puts in what is missing before a page that is there.
func (g *guest) before(at, end int64, buf []byte) error {
	for at < end {
		n, err := g.fill(at, end-at, buf)
		if errors.Is(err, errAgain) { // nobody waits for it
			return nil
		}
		if err != nil {
			return err
		}
		at += n
	}
	return nil
}

// fill puts pages in that nobody waits for, if they are not there. It says how far
// it came; all pages before are there.
func (g *guest) fill(offset, length int64, buf []byte) (int64, error) {
	if page := offset / g.page; g.present.has(page) || g.removed.has(page) {
		return g.page, nil
	}
	n, err := g.put(offset, length, buf, false)
	if n == 0 && err == nil {
		n = g.page
	}
	return n, err
}

// put makes pages present: of the length asked for as much as is alike. The first
// is put in for certain; after it those that may be there already end it.
func (g *guest) put(offset, length int64, buf []byte, wanted bool) (int64, error) {
	length = g.alike(offset, max(min(length, int64(len(buf)))/g.page*g.page, g.page))
	var data []byte // nil for pages that are zero
	if !g.removed.has(offset / g.page) {
		var err error
		// The disk may take its time: nothing is held.
		if data, length, err = g.load(offset, length, buf); err != nil {
			return 0, err
		}
	}
	g.hook("loaded")
	g.mu.RLock()
	defer g.mu.RUnlock()
	at, left, ok := g.address(offset)
	if !ok {
		return 0, nil
	}
	length = g.alike(offset, min(length, left))
	if g.removed.has(offset / g.page) { // perhaps only since
		data, length = nil, g.page
	}
	g.hook("put")
	if data == nil && g.page != memory.BlockSize { // cannot be zeroed but by a copy
		data = buf[:length]
		clear(data)
	}
	return g.install(at, offset, length, data, wanted)
}

// alike cuts length off at the first page, after the one at offset, that may be
// there already or must not be the image's.
func (g *guest) alike(offset, length int64) int64 {
	pages := (g.image.Size() - offset + g.page - 1) / g.page
	length = min(length, pages*g.page)
	for n := g.page; n < length; n += g.page {
		if next := (offset + n) / g.page; g.present.has(next) || g.removed.has(next) {
			return n
		}
	}
	return length
}

// load reads pages of the image into buf, as many as are of one kind, and gives nil
// for those that are zero.
func (g *guest) load(offset, length int64, buf []byte) ([]byte, int64, error) {
	if g.page != memory.BlockSize {
		n := min(length, g.image.Size()-offset)
		clear(buf[n:length])
		_, err := g.image.ReadAt(buf[:n], offset)
		return buf[:length], length, err
	}
	run := g.image.Find(offset)
	if run.Layer == nil {
		return nil, min(length, run.Length), nil
	}
	if run.Length >= length {
		data, err := run.Bytes(buf[:length])
		return data, length, err
	}
	// What many layers have is put in at once.
	n := int64(0)
	for ; n < length && run.Layer != nil; run = g.image.Find(min(offset+n, g.image.Size()-1)) {
		part := min(run.Length, length-n)
		if err := run.Read(buf[n:][:part]); err != nil {
			return nil, 0, err
		}
		n += part
	}
	return buf[:n], n, nil
}

// install has the kernel put pages in.
func (g *guest) install(at uint64, offset, length int64, data []byte, wanted bool) (int64, error) {
	done := int64(0)
	for done < length {
		var (
			n   int
			err error
		)
		if data == nil {
			n, err = g.uffd.zero(at+uint64(done), int(length-done))
			g.zeroed.Add(int64(n))
		} else {
			n, err = g.uffd.copy(at+uint64(done), data[done:length])
			g.copied.Add(int64(n))
		}
		for i := range int64(n) / g.page {
			g.present.set((offset+done)/g.page + i)
		}
		done += int64(n)
		switch {
		case err == nil:
		case errors.Is(err, unix.EEXIST):
			g.present.set((offset + done) / g.page)
			if wanted { // who waits may have come too late for the wake of the other
				if err := g.outcome(g.uffd.wake(at+uint64(done), int(g.page))); err != nil {
					return done, err
				}
			}
			done += g.page
		case n > 0 && errors.Is(err, unix.EAGAIN): // a part; the rest says why
		case errors.Is(err, unix.ENOENT): // taken away meanwhile
			return max(done, g.page), nil
		default:
			if err = g.outcome(err); errors.Is(err, errAgain) && done > 0 {
				return done, nil // the page that somebody waits for is there
			}
			return done, err
		}
	}
	return done, nil
}

// outcome tells apart how a call can fail.
func (g *guest) outcome(err error) error {
	switch {
	case err == nil, errors.Is(err, unix.ENOENT):
		return nil
	case errors.Is(err, unix.EAGAIN):
		return errAgain
	case errors.Is(err, unix.ESRCH):
		return errEnded
	case errors.Is(err, unix.ENOMEM), errors.Is(err, unix.ENOSPC):
		return fmt.Errorf("the host has no memory left for it (huge pages come out of their own pool): %w", err)
	}
	return fmt.Errorf("put pages in: %w", err)
}
