package pager

import (
	"sync"

	"github.com/wrenn/wrenn/internal/sandbox"
)

const (
	leastMemory = 512 << 20
	memoryShare = 16 // of the host's: what the pager may take is a part of it
)

// OwnMemory is how much of the host's memory the pager may take for itself, in bytes. The
// images of virtual machines are not in it: they are in the page cache.
func OwnMemory() int64 {
	return max(leastMemory, hostMemory("MemTotal")/memoryShare)
}

// budget is the memory that what serves virtual machines may take. It is half of what the
// pager may: the collector lets garbage grow to as much again.
type budget struct {
	limit  int64
	shared func() int64 // bytes that are taken for all of them together

	mu    sync.Mutex
	taken int64
}

// take gives sandbox.ErrExhausted when so many bytes are not left.
func (b *budget) take(n int64) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if all := b.taken + b.shared(); all+n > b.limit {
		return sandbox.Errorf(sandbox.ErrExhausted,
			"the pager's own memory is used up: %d MiB of %d are taken, and %d more are asked for; end virtual machines that were resumed, or resume this one elsewhere",
			all>>20, b.limit>>20, (n+1<<20-1)>>20)
	}
	b.taken += n
	return nil
}

func (b *budget) give(n int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.taken -= n
}

// account is what is taken of a budget for one purpose. It is used by one goroutine at a
// time.
type account struct {
	of    *budget
	taken int64
}

// need has n bytes more taken.
func (a *account) need(n int64) error {
	if err := a.of.take(n); err != nil {
		return err
	}
	a.taken += n
	return nil
}

// close gives everything back.
func (a *account) close() {
	a.of.give(a.taken)
	a.taken = 0
}
