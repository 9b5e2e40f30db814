package atomicfile

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// MakeDirs makes the directory path and its missing parents, mode 0755 and
// owned by uid and gid. What it returns removes again those that it made and
// that are empty still; after an error there are none.
func MakeDirs(path string, uid, gid int) (undo func(), err error) {
	var made []string
	undo = func() {
		for i := len(made) - 1; i >= 0; i-- {
			_ = syscall.Rmdir(made[i]) // not when somebody uses it already
		}
	}
	if err := makeDirs(path, uid, gid, &made); err != nil {
		undo()
		return nil, err
	}
	return undo, nil
}

func makeDirs(path string, uid, gid int, made *[]string) error {
	info, err := os.Stat(path)
	if err == nil {
		if !info.IsDir() {
			return &fs.PathError{Op: "mkdir", Path: path, Err: syscall.ENOTDIR}
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := makeDirs(filepath.Dir(path), uid, gid, made); err != nil {
		return err
	}
	if err := os.Mkdir(path, 0o755); err != nil {
		if info, statErr := os.Stat(path); statErr == nil && info.IsDir() {
			return nil // somebody else made it meanwhile
		}
		return err
	}
	*made = append(*made, path)
	// Not what somebody may have put in its place.
	return os.Lchown(path, uid, gid)
}
