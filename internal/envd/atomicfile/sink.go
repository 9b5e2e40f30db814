package atomicfile

import (
	"errors"
	"io"
	"math"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	bufferSize = 256 << 10
	// flushEvery is how many bytes are written before the disk is told to begin
	// with them. Without that all would wait for the sync at the end.
	flushEvery = 8 << 20
)

var buffers = sync.Pool{New: func() any { return new([bufferSize]byte) }}

// sink writes a file in large pieces.
type sink struct {
	file    *os.File
	offset  int64
	flushed int64
}

func (s *sink) Write(p []byte) (int, error) {
	n, err := s.file.Write(p)
	s.advance(int64(n))
	return n, err
}

// ReadFrom copies r. What is limited from another file is copied by the kernel.
func (s *sink) ReadFrom(r io.Reader) (int64, error) {
	if limited, ok := r.(*io.LimitedReader); ok {
		if from, ok := limited.R.(*os.File); ok {
			return s.copyFile(from, limited.N)
		}
	}
	buf := buffers.Get().(*[bufferSize]byte)
	defer buffers.Put(buf)
	var total int64
	for {
		n, readErr := fill(r, buf[:])
		written, err := s.Write(buf[:n])
		total += int64(written)
		switch {
		case err != nil:
			return total, err
		case readErr == io.EOF: //nolint:errorlint // a wrapped one is a failure of the reader's
			return total, nil
		case readErr != nil:
			return total, readErr
		}
	}
}

// fill reads until buf is full. Unlike io.ReadFull it keeps the reader's error
// apart from its end: a body cut short is not a complete one.
func fill(r io.Reader, buf []byte) (n int, err error) {
	for n < len(buf) && err == nil {
		var more int
		more, err = r.Read(buf[n:])
		n += more
	}
	return n, err
}

func (s *sink) copyFile(from *os.File, limit int64) (int64, error) {
	var total int64
	for total < limit {
		n, err := s.file.ReadFrom(io.LimitReader(from, min(flushEvery, limit-total)))
		total += n
		s.advance(n)
		if err != nil || n == 0 {
			return total, err
		}
	}
	return total, nil
}

func (s *sink) advance(n int64) {
	s.offset += n
	if s.offset-s.flushed < flushEvery {
		return
	}
	// Only a hint: what it does not do is done by the sync.
	if err := unix.SyncFileRange(int(s.file.Fd()), s.flushed, s.offset-s.flushed, unix.SYNC_FILE_RANGE_WRITE); err != nil {
		s.flushed = math.MaxInt64 / 2 // not here, so do not ask again
		return
	}
	s.flushed = s.offset
}

// reserve sees that there is room for size bytes. Where that cannot be told it
// is left to the writes to find out.
func reserve(f *os.File, size int64) error {
	var disk unix.Statfs_t
	if size <= 0 || unix.Fstatfs(int(f.Fd()), &disk) == nil && size/max(disk.Bsize, 1) < int64(disk.Bavail) {
		return nil
	}
	// Only now, because it can take as long as writing all of it.
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, size)
	if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EFBIG) {
		return &os.PathError{Op: "reserve", Path: f.Name(), Err: err}
	}
	return nil
}

// Append copies up to limit bytes of from to w, where it can by the kernel's own
// hand. What fill gets from Write is such a w.
func Append(w io.Writer, from *os.File, limit int64) (int64, error) {
	return io.Copy(w, io.LimitReader(from, limit))
}
