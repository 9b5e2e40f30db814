// Package disk keeps the disks of virtual machines: images of file systems, and
// clones of them that share what neither has changed.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// copyChunk is what is copied between two looks at whether to go on.
const copyChunk = 16 << 20

// Clone makes dst a copy of the file src. On a file system with reflinks the two
// share their blocks, and the size does not matter; elsewhere the data is copied
// and the holes are not. dst is replaced at once if there is one. A full disk gives
// sandbox.ErrExhausted.
func Clone(ctx context.Context, src, dst string) error {
	if err := clone(ctx, src, dst); err != nil {
		return fmt.Errorf("clone disk %s: %w", src, Full(err))
	}
	return nil
}

func clone(ctx context.Context, src, dst string) (err error) {
	in, err := os.Open(src)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.CreateTemp(filepath.Dir(dst), ".clone-")
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	err = unix.IoctlFileClone(int(out.Fd()), int(in.Fd()))
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EXDEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY) {
		err = copySparse(ctx, out, in)
	}
	if err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return os.Rename(out.Name(), dst)
}

// copySparse copies the data of in, and leaves holes where it has them.
func copySparse(ctx context.Context, out, in *os.File) error {
	fi, err := in.Stat()
	if err != nil {
		return err
	}
	if err := out.Truncate(fi.Size()); err != nil {
		return err
	}
	for at := int64(0); at < fi.Size(); {
		data, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) { // a hole up to the end
			return nil
		}
		if err != nil {
			return err
		}
		hole, err := unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		if err := copyRange(ctx, out, in, data, hole); err != nil {
			return err
		}
		at = hole
	}
	return nil
}

func copyRange(ctx context.Context, out, in *os.File, from, to int64) error {
	for at := from; at < to; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(to-at, copyChunk)
		readAt, writeAt := at, at
		copied, err := unix.CopyFileRange(int(in.Fd()), &readAt, int(out.Fd()), &writeAt, int(n), 0)
		switch {
		case errors.Is(err, unix.EINTR):
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
			// Kernels before 5.3 do it within one file system only.
			if _, err := io.Copy(io.NewOffsetWriter(out, at), io.NewSectionReader(in, at, n)); err != nil {
				return err
			}
			at += n
		case err != nil:
			return err
		case copied == 0:
			return errors.New("the file has become shorter")
		default:
			at += int64(copied)
		}
	}
	return nil
}

// HoldsReflinks says whether files below dir can share blocks, by trying it, and whether
// their holes are as fine as pages of memory: where they are not, what was never written
// next to what was looks like zeroes that were. An error says neither.
func HoldsReflinks(dir string) (bool, error) {
	src, err := os.CreateTemp(dir, ".reflink-")
	if err != nil {
		return false, fmt.Errorf("try reflinks: %w", Full(err))
	}
	defer os.Remove(src.Name())
	defer src.Close()
	dst, err := os.CreateTemp(dir, ".reflink-")
	if err != nil {
		return false, fmt.Errorf("try reflinks: %w", Full(err))
	}
	defer os.Remove(dst.Name())
	defer dst.Close()
	const page, at, size = 4096, 64 << 10, 256 << 10
	if err := src.Truncate(size); err != nil {
		return false, fmt.Errorf("try reflinks: %w", Full(err))
	}
	if _, err := src.WriteAt(make([]byte, page), at); err != nil {
		return false, fmt.Errorf("try reflinks: %w", Full(err))
	}
	err = unix.IoctlFileClone(int(dst.Fd()), int(src.Fd()))
	switch {
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOTTY), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EXDEV), errors.Is(err, unix.ENOSYS):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("try reflinks: %w", Full(err))
	}
	data, derr := unix.Seek(int(dst.Fd()), 0, unix.SEEK_DATA)
	hole, herr := unix.Seek(int(dst.Fd()), at, unix.SEEK_HOLE)
	return derr == nil && herr == nil && data == at && hole == at+page, nil
}

// Full gives an error of a full disk its kind: sandbox.ErrExhausted. Others, and nil,
// it returns as they are.
func Full(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return &sandbox.Error{Kind: sandbox.ErrExhausted, Message: "the host's disk is full", Cause: err}
	}
	return err
}
