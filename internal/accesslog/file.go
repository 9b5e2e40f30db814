package accesslog

import (
	"bytes"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// maxSize is how large a log gets, in bytes, before it is set aside.
const maxSize = 64 << 20

// file is a log on disk, or a device.
type file struct {
	path    string
	maxSize int64

	f       *os.File // nil while it could not be opened
	info    os.FileInfo
	size    int64 // of a regular file
	regular bool
	torn    bool // the last line lacks its end
}

func openFile(path string, maxSize int64) (*file, error) {
	s := &file{path: path, maxSize: maxSize}
	return s, s.open()
}

func (s *file) open() error {
	if info, err := os.Stat(s.path); err == nil && !info.Mode().IsRegular() && info.Mode()&os.ModeCharDevice == 0 {
		return fmt.Errorf("%s is neither a file nor a character device", s.path) // a pipe would wait for its reader
	}
	f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err == nil {
		s.f, s.info, s.size, s.regular, s.torn = f, info, info.Size(), info.Mode().IsRegular(), false
		if s.regular {
			err = s.repair()
		}
	}
	if err != nil {
		f.Close()
		s.f = nil
		return fmt.Errorf("look at %s: %w", s.path, err)
	}
	return nil
}

// repair takes the beginning of a line away that a crash has left at the end of the
// file. Any other text is somebody else's: it only gets its end of line.
func (s *file) repair() error {
	const longest = 64 << 10 // far more than a line can have
	tail := make([]byte, min(s.size, longest))
	if _, err := s.f.ReadAt(tail, s.size-int64(len(tail))); err != nil && err != io.EOF {
		return err
	}
	if len(tail) == 0 || tail[len(tail)-1] == '\n' {
		return nil
	}
	rest := tail[bytes.LastIndexByte(tail, '\n')+1:]
	begin := []byte(`{"time":"`)
	if !bytes.HasPrefix(rest, begin) && !bytes.HasPrefix(begin, rest) {
		s.torn = true
		return nil
	}
	s.size -= int64(len(rest))
	return s.f.Truncate(s.size)
}

func (s *file) write(lines []byte) (int, error) {
	err := s.prepare(len(lines))
	if s.f == nil {
		return countLines(lines), err
	}
	if s.torn {
		if _, err := s.f.Write([]byte{'\n'}); err != nil {
			return countLines(lines), err
		}
		s.torn = false
		s.size++
	}
	n, werr := s.f.Write(lines)
	s.size += int64(n)
	if werr == nil {
		return 0, err
	}
	whole := bytes.LastIndexByte(lines[:n], '\n') + 1
	s.cut(n - whole)
	return countLines(lines[whole:]), werr
}

// cut takes back the last n bytes: the beginning of a line that did not fit.
func (s *file) cut(n int) {
	if n == 0 {
		return
	}
	if info, err := s.f.Stat(); s.regular && err == nil && s.f.Truncate(info.Size()-int64(n)) == nil {
		s.size = info.Size() - int64(n)
		return
	}
	s.torn = true
}

// prepare makes the file ready to take n bytes: opens it anew when it has been moved
// or removed, as programs that turn logs do, and sets it aside when it is full. There
// may be a file to write to in spite of an error.
func (s *file) prepare(n int) error {
	if s.f != nil && s.regular {
		if now, err := os.Stat(s.path); err != nil || !os.SameFile(now, s.info) {
			s.release()
		} else {
			s.size = now.Size() // some of them cut it short
		}
	}
	if s.f != nil && s.regular && s.size > 0 && s.size+int64(n) > s.maxSize {
		if err := os.Rename(s.path, s.path+".1"); err != nil {
			return fmt.Errorf("set access log aside: %w", err)
		}
		s.release()
	}
	if s.f == nil {
		return s.open()
	}
	return nil
}

func (s *file) release() {
	s.f.Close()
	s.f = nil
}

func (s *file) Close() error {
	if s.f == nil {
		return nil
	}
	return s.f.Close()
}

// stdout is a log on standard output.
type stdout struct {
	f    *os.File
	torn bool
}

// openStdout takes a descriptor of its own: a write to descriptor 1 whose reader has
// gone would end the process.
func openStdout() (*stdout, error) {
	fd, err := unix.FcntlInt(os.Stdout.Fd(), unix.F_DUPFD_CLOEXEC, 3)
	if err != nil {
		return nil, fmt.Errorf("use standard output: %w", err)
	}
	return &stdout{f: os.NewFile(uintptr(fd), "standard output")}, nil
}

func (s *stdout) write(lines []byte) (int, error) {
	if s.torn {
		if _, err := s.f.Write([]byte{'\n'}); err != nil {
			return countLines(lines), err
		}
		s.torn = false
	}
	n, err := s.f.Write(lines)
	whole := bytes.LastIndexByte(lines[:n], '\n') + 1
	s.torn = n > whole
	return countLines(lines[whole:]), err
}

func (s *stdout) Close() error { return s.f.Close() }
