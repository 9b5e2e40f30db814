package pager

import "sync/atomic"

// bitmap has a bit for each page of a memory.
type bitmap []atomic.Uint64

// bitmapSize is how many bytes one of n bits takes.
func bitmapSize(n int64) int64 { return (n + 63) / 64 * 8 }

func newBitmap(n int64) bitmap { return make(bitmap, (n+63)/64) }

func (b bitmap) has(i int64) bool { return b[i/64].Load()&(1<<(i%64)) != 0 }

// set says whether the bit was clear before.
func (b bitmap) set(i int64) bool { return b[i/64].Or(1<<(i%64))&(1<<(i%64)) == 0 }

func (b bitmap) clear(i int64) { b[i/64].And(^uint64(1 << (i % 64))) }
