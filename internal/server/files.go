package server

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// wantedFiles is how many descriptors the process should be able to hold: a proxied
// WebSocket takes two.
const wantedFiles = 1 << 20

// RaiseFileLimit lets this process, and what it starts, open as many files as the
// kernel allows, up to a million. It returns how many it may open now. Without the
// right to raise the hard limit it stops there, which is no error.
func RaiseFileLimit() (uint64, error) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		return 0, fmt.Errorf("get limit of open files: %w", err)
	}
	// The kernel's own bound, fs.nr_open, is not told to everybody: try.
	for want := uint64(wantedFiles); want > limit.Cur; want /= 2 {
		raised := unix.Rlimit{Cur: want, Max: max(want, limit.Max)}
		err := unix.Setrlimit(unix.RLIMIT_NOFILE, &raised)
		if err == nil {
			return want, nil
		}
		if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EINVAL) {
			return limit.Cur, fmt.Errorf("raise limit of open files: %w", err)
		}
	}
	return limit.Cur, nil
}
