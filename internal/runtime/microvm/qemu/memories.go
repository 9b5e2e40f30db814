package qemu

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/memory"
)

// lingerTime is how long the memory of an image is kept after it was last loaded, for
// whoever loads it next to share it with those that run.
const lingerTime = time.Minute

// memories are those of images that machines have been loaded from lately, as files
// in memory that can be mapped and not be written.
type memories struct {
	mu    sync.Mutex
	files map[[32]byte]*shared
}

// shared is the memory of one image.
type shared struct {
	key    [32]byte
	file   *os.File      // valid once ready is closed and err is nil
	err    error         // valid once ready is closed
	ready  chan struct{} // closed when it is filled
	users  int           // that load it just now
	forget *time.Timer   // nil while there are users
}

// get gives the memory of the image in dir, filled by whoever comes first.
func (ms *memories) get(ctx context.Context, dir string, image *memory.Image) (*shared, error) {
	header, err := os.ReadFile(filepath.Join(dir, memory.HeaderName))
	if err != nil {
		return nil, err
	}
	s, found := ms.take(sha256.Sum256(header)) // which names the layers, and those never change
	if !found {
		// For all that wait for it, so not broken off with this one.
		s.file, s.err = fill(context.WithoutCancel(ctx), image)
		close(s.ready)
	}
	select {
	case <-s.ready:
		err = s.err
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		ms.put(s)
		return nil, err
	}
	return s, nil
}

func (ms *memories) take(key [32]byte) (s *shared, found bool) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if s, found = ms.files[key]; !found {
		s = &shared{key: key, ready: make(chan struct{})}
		ms.files[key] = s
	}
	s.users++
	if s.forget != nil {
		s.forget.Stop()
		s.forget = nil
	}
	return s, found
}

// put ends a use. Machines that map the file keep what they map.
func (ms *memories) put(s *shared) {
	ms.mu.Lock()
	defer ms.mu.Unlock()
	if s.users--; s.users > 0 {
		return
	}
	if s.err != nil {
		delete(ms.files, s.key)
		return
	}
	s.forget = time.AfterFunc(lingerTime, func() {
		ms.mu.Lock()
		defer ms.mu.Unlock()
		if s.users == 0 && ms.files[s.key] == s {
			delete(ms.files, s.key)
			s.file.Close()
		}
	})
}

// fill makes a file of an image's memory that can be mapped and not be written.
func fill(ctx context.Context, image *memory.Image) (_ *os.File, err error) {
	f, err := memfd("memory")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			f.Close()
		}
	}()
	if err := image.CopyTo(ctx, f); err != nil {
		return nil, err
	}
	_, err = unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	if err != nil {
		return nil, fmt.Errorf("seal file in memory: %w", err)
	}
	return f, nil
}

func memfd(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("make file in memory: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
