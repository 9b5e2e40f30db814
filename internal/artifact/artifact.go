// Package artifact makes what is made once on a host and then only read, as templates
// and kernels are, in a directory that several processes share: by one of them at a
// time, and whole or not at all. It imports nothing of ours.
package artifact

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// Lock keeps others from making something in dir, and waits for who does. waiting, if
// there is one, is called once when it has to wait.
func Lock(ctx context.Context, dir string, waiting func()) (unlock func(), err error) {
	path := filepath.Join(dir, ".lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	// flock cannot be told to give up, so it is asked again and again.
	retry := time.NewTicker(100 * time.Millisecond)
	defer retry.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			f.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if waiting != nil {
			waiting()
			waiting = nil
		}
		select {
		case <-retry.C:
		case <-ctx.Done():
			f.Close()
			return nil, ctx.Err()
		}
	}
}

// TempPrefix begins the names of what is not finished.
const TempPrefix = ".tmp-"

// RemoveLeftovers deletes what was not finished in dir. The caller holds the lock, so
// nobody is at it.
func RemoveLeftovers(dir string) error {
	old, err := filepath.Glob(filepath.Join(dir, TempPrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range old {
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("remove what an interrupted build or installation left: %w", err)
		}
	}
	return nil
}

// Sync writes everything of the file system that holds dir to disk: before what is
// finished gets its name, and after.
func Sync(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	if err := unix.Syncfs(int(d.Fd())); err != nil {
		return fmt.Errorf("write %s to disk: %w", dir, err)
	}
	return nil
}
