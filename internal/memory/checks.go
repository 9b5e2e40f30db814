package memory

import (
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// Checks remembers of layers which blocks were found to be what was written, so that
// images that share layers, or are opened again, check each block once. It is safe for
// concurrent use.
type Checks struct {
	mu    sync.Mutex
	files map[layerFile]*checks
	order []layerFile // as they were first seen
	size  int64
}

// keptChecks bounds what Checks remembers, in bytes. A GiB of memory takes one MiB.
const keptChecks = 64 << 20

// layerFile is a layer's file as it was when it was opened.
type layerFile struct {
	id       [16]byte
	dev, ino uint64
	written  unix.Timespec
}

// checks is what is known of a layer.
type checks struct {
	loading sync.Mutex
	sums    atomic.Pointer[[]byte] // 4 bytes for each block; nil: not read yet
	good    []atomic.Uint64        // a bit for each block; nil: it is not noted
}

// Open is the function Open, with what is remembered.
func (c *Checks) Open(dir string) (*Image, error) {
	img, err := Open(dir)
	if err != nil {
		return nil, err
	}
	for _, l := range img.layers {
		if known := c.of(l); known != nil {
			l.checks = known
		}
	}
	return img, nil
}

// of gives what is known of a layer that was just opened; nil: it cannot be said which
// file it is.
func (c *Checks) of(l *Layer) *checks {
	key, err := l.identify()
	if err != nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if known := c.files[key]; known != nil {
		return known
	}
	known := &checks{good: make([]atomic.Uint64, (l.ref.blocks+63)/64)}
	if c.files == nil {
		c.files = map[layerFile]*checks{}
	}
	c.files[key] = known
	c.order = append(c.order, key)
	c.size += checksSize(l.ref.blocks)
	for c.size > keptChecks && len(c.order) > 1 {
		oldest := c.order[0]
		c.size -= checksSize(uint64(len(c.files[oldest].good)) * 64)
		delete(c.files, oldest)
		c.order = c.order[1:]
	}
	return known
}

// checksSize is what is remembered of so many blocks, rounded up to 64.
func checksSize(blocks uint64) int64 { return int64((blocks+63)/64) * 64 * 4 }

func (l *Layer) identify() (layerFile, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(l.file.Fd()), &st); err != nil {
		return layerFile{}, os.NewSyscallError("fstat", err)
	}
	return layerFile{id: l.ref.id, dev: st.Dev, ino: st.Ino, written: st.Mtim}, nil
}

// note remembers that n blocks from one on are good.
func (c *checks) note(block, n uint64) {
	for i := block; c.good != nil && i < block+n; i++ {
		c.good[i/64].Or(1 << (i % 64))
	}
}

// has says whether n blocks from one on were found to be good.
func (c *checks) has(block, n uint64) bool {
	for i := block; i < block+n; i++ {
		if c.good == nil || c.good[i/64].Load()&(1<<(i%64)) == 0 {
			return false
		}
	}
	return true
}
