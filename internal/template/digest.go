package template

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// digestTree returns a SHA-256 over everything that a sandbox can see of the
// tree at root, and the bytes that its regular files hold. Per entry, in lexical
// order: path, type and mode, owner, modification time, and the content's hash,
// the link's target or the device's number. Names are quoted, so no name can
// pass for the fields after it.
func digestTree(ctx context.Context, root string) (digest string, size int64, err error) {
	sum := sha256.New()
	err = filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: path, Err: err}
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		var content string
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			size += st.Size
			content, err = fileHash(path)
		case unix.S_IFLNK:
			content, err = os.Readlink(path)
		case unix.S_IFBLK, unix.S_IFCHR:
			content = strconv.FormatUint(uint64(st.Rdev), 16)
		}
		if err != nil {
			return err
		}
		_, err = fmt.Fprintf(sum, "%q %o %d:%d %d %q\n", rel, st.Mode, st.Uid, st.Gid, st.Mtim.Nano(), content)
		return err
	})
	if err != nil {
		return "", 0, fmt.Errorf("digest tree: %w", err)
	}
	return hex.EncodeToString(sum.Sum(nil)), size, nil
}

func fileHash(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	if _, err := io.Copy(sum, f); err != nil {
		return "", err
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}
