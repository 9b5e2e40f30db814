package gvisor

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// installed remembers which copy was made of which binary, so that a start need
// not read the binary, some 100 MB, to find that nothing has changed.
type installed struct {
	Device  uint64    `json:"device"`
	Inode   uint64    `json:"inode"`
	Size    int64     `json:"size"`
	ModTime time.Time `json:"modTime"`
	Name    string    `json:"name"` // file name of the copy
}

const installedFile = "runsc.json"

// InstallBinary copies the running binary into dir, named runsc-<hash of its
// content>, and returns the path of the copy. Sandboxes keep the copy that they
// were started with, so a new build of the binary disturbs none.
func InstallBinary(dir string) (string, error) {
	path, err := installBinary(dir, "/proc/self/exe") // also when its file was replaced meanwhile
	if err != nil {
		return "", fmt.Errorf("install runsc: %w", err)
	}
	return path, nil
}

func installBinary(dir, binary string) (string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	src, err := os.Open(binary)
	if err != nil {
		return "", err
	}
	defer src.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(src.Fd()), &st); err != nil {
		return "", err
	}
	now := installed{Device: uint64(st.Dev), Inode: st.Ino, Size: st.Size, ModTime: time.Unix(st.Mtim.Unix()).UTC()}

	memory := filepath.Join(dir, installedFile)
	var last installed
	if data, err := os.ReadFile(memory); err == nil && json.Unmarshal(data, &last) == nil {
		now.Name = last.Name
		if path := filepath.Join(dir, last.Name); last == now && whole(path, now.Size) {
			return path, nil
		}
	}

	// The copy is hashed while it is made; a copy that is there already costs a
	// needless write once per build, and no second read ever.
	tmp, err := os.CreateTemp(dir, ".runsc-")
	if err != nil {
		return "", err
	}
	defer os.Remove(tmp.Name()) // fails once renamed
	hash := sha256.New()
	_, err = io.Copy(io.MultiWriter(tmp, hash), src)
	if err = errors.Join(err, tmp.Chmod(0o755), tmp.Sync(), tmp.Close()); err != nil {
		return "", err
	}
	now.Name = "runsc-" + hex.EncodeToString(hash.Sum(nil))[:16]
	path := filepath.Join(dir, now.Name)
	if !whole(path, now.Size) {
		if err := os.Rename(tmp.Name(), path); err != nil {
			return "", err
		}
	}
	data, err := json.Marshal(now)
	if err != nil {
		return "", err
	}
	return path, replaceFile(memory, data)
}

// whole reports whether the file is an executable of that size.
func whole(path string, size int64) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode().Perm()&0o111 != 0 && info.Size() == size
}

// replaceFile writes the file so that a reader finds the old content or the new.
func replaceFile(path string, data []byte) error {
	tmp := path + ".new"
	if err := os.WriteFile(tmp, data, 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}
