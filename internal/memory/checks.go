package memory

import (
	"os"
	"slices"
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
	idle  []layerFile // of no open image, the longest so first
	size  int64       // bytes, of all
	spare int64       // of those that are idle
}

// keptChecks bounds what Checks remembers of layers that no image has open, in bytes. A
// GiB of memory takes one MiB.
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
	users   int                    // open images; of Checks, and by its mutex
}

// Open is the function Open, with what is remembered.
func (c *Checks) Open(dir string) (*Image, error) {
	img, err := Open(dir)
	if err != nil {
		return nil, err
	}
	var used []layerFile
	for _, l := range img.layers {
		if key, err := l.identify(); err == nil { // else nothing is remembered of it
			l.checks = c.use(key, l.ref.blocks)
			used = append(used, key)
		}
	}
	img.closed = sync.OnceFunc(func() { c.release(used) })
	return img, nil
}

// use gives what is known of a layer's file until it is released.
func (c *Checks) use(key layerFile, blocks uint64) *checks {
	c.mu.Lock()
	defer c.mu.Unlock()
	known := c.files[key]
	if known == nil {
		known = &checks{good: make([]atomic.Uint64, (blocks+63)/64)}
		if c.files == nil {
			c.files = map[layerFile]*checks{}
		}
		c.files[key] = known
		c.size += known.size()
	} else if known.users == 0 {
		c.idle = slices.DeleteFunc(c.idle, func(k layerFile) bool { return k == key })
		c.spare -= known.size()
	}
	known.users++
	return known
}

func (c *Checks) release(used []layerFile) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, key := range used {
		known := c.files[key]
		if known.users--; known.users == 0 {
			c.idle = append(c.idle, key)
			c.spare += known.size()
		}
	}
	for c.spare > keptChecks {
		oldest := c.files[c.idle[0]].size()
		delete(c.files, c.idle[0])
		c.idle = c.idle[1:]
		c.size -= oldest
		c.spare -= oldest
	}
}

// Size is how many bytes of memory what is remembered of layers takes that some image has
// open, when it is complete.
func (c *Checks) Size() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.size - c.spare
}

// size is what is remembered of a layer, in bytes: for a block its checksum and a bit.
func (c *checks) size() int64 { return int64(len(c.good)) * (64*4 + 8) }

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
