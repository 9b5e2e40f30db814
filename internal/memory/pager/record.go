package pager

import (
	"errors"
	"os"
	"sync"

	"github.com/wrenn/wrenn/internal/memory"
)

// workingSet is what is known of a virtual machine's, or who records it.
type workingSet struct {
	blocks   []uint32
	own      account // what it takes until it is put in
	recorder *recorder
}

// perPage is what a page of a working set takes at most, in bytes: in the file, in the
// order of touching and of the memory, and as a stretch in a slice that grows.
const perPage = 48

// workingSet reads the virtual machine's, or begins to record it.
func (a *attachment) workingSet() *workingSet {
	set := &workingSet{own: account{of: a.own.of}}
	if a.vm.WorkingSet == "" {
		return set
	}
	if !a.vm.Record {
		if info, err := os.Stat(a.vm.WorkingSet); err == nil {
			if err := set.own.need(info.Size() / 4 * perPage); err != nil {
				a.log.Warn("the working set of a virtual machine comes when it is asked for", "err", err)
				return set
			}
		}
		blocks, err := ReadWorkingSet(a.vm.WorkingSet)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			a.log.Warn("a working set is recorded again", "err", err)
		}
		if err == nil {
			set.blocks = blocks
			return set
		}
	}
	pages := a.image.Size() / memory.BlockSize
	r := &recorder{own: account{of: a.own.of}}
	if err := r.own.need(bitmapSize(pages)); err != nil {
		a.log.Warn("the working set of a virtual machine is not recorded", "err", err)
		return set
	}
	r.seen = newBitmap(pages)
	set.recorder = r
	return set
}

// close forgets what is put in.
func (w *workingSet) close() {
	w.blocks = nil
	w.own.close()
}

// saveSet ends a recording, and returns when its working set is written.
func (a *attachment) saveSet(r *recorder) {
	a.saving.Lock()
	defer a.saving.Unlock()
	defer r.close()
	blocks := r.finish()
	if len(blocks) == 0 {
		return
	}
	err := WriteWorkingSet(a.vm.WorkingSet, blocks)
	if a.vm.Copy != "" {
		if cerr := WriteWorkingSet(a.vm.Copy, blocks); !errors.Is(cerr, os.ErrNotExist) {
			err = errors.Join(err, cerr)
		}
	}
	if err != nil {
		a.log.Warn("the working set of a virtual machine is not kept", "err", err)
	}
}

// recorder notes in which order pages are first touched.
type recorder struct {
	mu     sync.Mutex
	own    account
	seen   bitmap
	blocks []uint32
	done   bool
	full   bool // there is no memory for more
}

func (r *recorder) active() bool {
	if r == nil {
		return false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.done
}

func (r *recorder) add(g *guest, e event) {
	g.mu.RLock()
	offset, ok := g.offset(e.b)
	g.mu.RUnlock()
	r.mu.Lock()
	defer r.mu.Unlock()
	page := offset / g.page
	if !ok || r.done || r.full || len(r.blocks) == maxSet || !r.seen.set(page) {
		return
	}
	if len(r.blocks) == cap(r.blocks) && !r.grow() {
		return
	}
	r.blocks = append(r.blocks, uint32(page*g.page/memory.BlockSize))
}

const (
	growBy        = 16 << 10  // pages
	recordPerPage = 4 + 4 + 4 // bytes: as it is, as it is copied or written
)

// grow makes room for more pages. Where there is none the recording ends with those that
// were touched first.
func (r *recorder) grow() bool {
	if r.own.need(growBy*recordPerPage) != nil {
		r.full = true
		return false
	}
	r.blocks = append(make([]uint32, 0, len(r.blocks)+growBy), r.blocks...)
	return true
}

// finish ends the recording and gives what it has. It gives nothing twice.
func (r *recorder) finish() []uint32 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.done {
		return nil
	}
	r.done = true
	return r.blocks
}

// close forgets what was recorded, and is called after finish.
func (r *recorder) close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.blocks, r.seen = nil, nil
	r.own.close()
}
