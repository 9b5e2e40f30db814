package template

import (
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// normalise removes from the finished tree at root what differs between two
// builds of the same packages: device nodes and mount points are emptied (the
// runtime brings its own), and nothing is newer than epoch.
func normalise(ctx context.Context, root string, epoch time.Time) error {
	for _, dir := range []string{"dev", "proc", "sys"} {
		if err := empty(filepath.Join(root, dir)); err != nil {
			return fmt.Errorf("empty /%s: %w", dir, err)
		}
	}
	err := filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		return clampTime(path, epoch)
	})
	if err != nil {
		return fmt.Errorf("set file times: %w", err)
	}
	return nil
}

// clampTime sets the modification time of path to epoch when it is later. Times
// that packages gave are kept: compiled Python modules refer to them.
func clampTime(path string, epoch time.Time) error {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	if st.Mtim.Nano() <= epoch.UnixNano() {
		return nil
	}
	at := unix.NsecToTimespec(epoch.UnixNano())
	err := unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{at, at}, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return &fs.PathError{Op: "utimensat", Path: path, Err: err}
	}
	return nil
}

func empty(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
