package memory

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"

	"golang.org/x/sys/unix"
)

// Segment says where in a process a part of the memory is.
type Segment struct {
	Address uintptr // in the process
	Range           // of the memory
}

// ProcessMemory is the memory of a virtual machine as its monitor has it mapped.
// Dirty are the pages that the process has of its own: all that were touched in
// anonymous memory, and those written since in a private mapping of a file. The
// process must not change them meanwhile. Segments are in the memory's order.
type ProcessMemory struct {
	PID      int
	Segments []Segment
}

// Bits of /proc/PID/pagemap.
const (
	pagePresent = 1 << 63
	pageSwapped = 1 << 62
	pageOfFile  = 1 << 61 // or shared
)

// pagemapPiece is how many pages are looked up at once.
const pagemapPiece = 32 << 10

// Dirty implements Source.
func (m ProcessMemory) Dirty(ctx context.Context) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		f, err := os.Open(fmt.Sprintf("/proc/%d/pagemap", m.PID))
		if errors.Is(err, os.ErrNotExist) {
			err = errGone(m.PID)
		}
		if err != nil {
			yield(Range{}, err)
			return
		}
		defer f.Close()
		buf := make([]byte, pagemapPiece*8)
		for _, s := range m.Segments {
			for s.Length > 0 {
				part := s
				part.Length = min(s.Length, pagemapPiece*BlockSize)
				if !m.dirtyPart(ctx, f, buf, part, yield) {
					return
				}
				s.Address += uintptr(part.Length)
				s.Offset, s.Length = s.Offset+part.Length, s.Length-part.Length
			}
		}
	}
}

func (m ProcessMemory) dirtyPart(ctx context.Context, f *os.File, buf []byte, s Segment, yield func(Range, error) bool) bool {
	if err := ctx.Err(); err != nil {
		yield(Range{}, err)
		return false
	}
	buf = buf[:s.Length/BlockSize*8]
	if _, err := f.ReadAt(buf, int64(s.Address/BlockSize)*8); err != nil {
		if errors.Is(err, io.EOF) { // also when the process has ended meanwhile
			err = errGone(m.PID)
		}
		yield(Range{}, fmt.Errorf("read page map: %w", err))
		return false
	}
	start := -1
	pages := len(buf) / 8
	for i := 0; i <= pages; i++ {
		private := false
		if i < pages {
			e := binary.LittleEndian.Uint64(buf[i*8:])
			private = e&(pagePresent|pageSwapped) != 0 && e&pageOfFile == 0
		}
		switch {
		case private && start < 0:
			start = i
		case !private && start >= 0:
			if !yield(Range{s.Offset + int64(start)*BlockSize, int64(i-start) * BlockSize}, nil) {
				return false
			}
			start = -1
		}
	}
	return true
}

// maxVectors is how many ranges the kernel takes at once.
const maxVectors = 1024

// Read implements Source.
func (m ProcessMemory) Read(ctx context.Context, p []byte, ranges []Range) error {
	var remote []unix.RemoteIovec
	total := 0
	flush := func() error {
		if err := m.readVectors(p[:total], remote); err != nil {
			return err
		}
		p, total, remote = p[total:], 0, remote[:0]
		return ctx.Err()
	}
	for _, r := range ranges {
		for r.Length > 0 {
			s, ok := m.segment(r.Offset)
			if !ok {
				return fmt.Errorf("no segment holds %d", r.Offset)
			}
			n := min(r.Length, s.Offset+s.Length-r.Offset)
			remote = append(remote, unix.RemoteIovec{Base: s.Address + uintptr(r.Offset-s.Offset), Len: int(n)})
			total += int(n)
			r.Offset, r.Length = r.Offset+n, r.Length-n
			if len(remote) == maxVectors {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	return flush()
}

func (m ProcessMemory) segment(offset int64) (Segment, bool) {
	for _, s := range m.Segments {
		if offset >= s.Offset && offset < s.Offset+s.Length {
			return s, true
		}
	}
	return Segment{}, false
}

func (m ProcessMemory) readVectors(p []byte, remote []unix.RemoteIovec) error {
	for len(p) > 0 {
		local := []unix.Iovec{{Base: &p[0]}}
		local[0].SetLen(len(p))
		n, err := unix.ProcessVMReadv(m.PID, local, remote, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if errors.Is(err, unix.ESRCH) {
			return errGone(m.PID)
		}
		if err != nil {
			return fmt.Errorf("read memory of process %d: %w", m.PID, err)
		}
		if n == 0 {
			return fmt.Errorf("read memory of process %d: nothing there", m.PID)
		}
		p = p[n:]
		for n > 0 {
			if n >= remote[0].Len {
				n -= remote[0].Len
				remote = remote[1:]
				continue
			}
			remote[0].Base += uintptr(n)
			remote[0].Len -= n
			n = 0
		}
	}
	return nil
}

// SparseFile is a memory as a file, as Firecracker writes it: what is no hole is
// dirty.
type SparseFile struct {
	File *os.File
	Size int64
}

// Dirty implements Source.
func (s SparseFile) Dirty(ctx context.Context) iter.Seq2[Range, error] {
	return func(yield func(Range, error) bool) {
		fd := int(s.File.Fd())
		for at := int64(0); at < s.Size; {
			data, err := unix.Seek(fd, at, unix.SEEK_DATA)
			if errors.Is(err, unix.ENXIO) { // a hole up to the end
				return
			}
			hole := data
			if err == nil {
				hole, err = unix.Seek(fd, data, unix.SEEK_HOLE)
			}
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(Range{}, fmt.Errorf("look for holes: %w", err))
				return
			}
			// The file system's blocks may be smaller than ours.
			data = max(data/BlockSize*BlockSize, at)
			hole = min((hole+BlockSize-1)/BlockSize*BlockSize, s.Size)
			if data >= hole {
				return
			}
			if !yield(Range{data, hole - data}, nil) {
				return
			}
			at = hole
		}
	}
}

// Read implements Source.
func (s SparseFile) Read(ctx context.Context, p []byte, ranges []Range) error {
	for _, r := range ranges {
		n, err := s.File.ReadAt(p[:r.Length], r.Offset)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		clear(p[n:r.Length]) // of a file that ends within a block
		p = p[r.Length:]
	}
	return ctx.Err()
}
