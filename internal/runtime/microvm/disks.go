package microvm

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sync/singleflight"
	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/disk"
)

// disks are the disk images that machines share: of each template one that every
// root disk is a clone of, and of each guest agent one that all machines with it
// read. Each is made when it is first needed and named by what it was made from.
type disks struct {
	dir    string
	log    *slog.Logger
	making singleflight.Group
}

const (
	imageExt  = ".ext4"
	sourceExt = ".source" // beside a template's image: the path of the template

	unreadyExt = ".new"
)

// openDisks removes what belongs to templates that are gone, and what a kill left
// unfinished.
func openDisks(dir string, log *slog.Logger) (*disks, error) {
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, fmt.Errorf("make directory of disk images: %w", err)
	}
	d := &disks{dir: dir, log: log}
	if err := d.sweep(); err != nil {
		return nil, fmt.Errorf("sweep disk images: %w", err)
	}
	return d, nil
}

func (d *disks) sweep() error {
	entries, err := os.ReadDir(d.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		name := e.Name()
		path := filepath.Join(d.dir, name)
		switch {
		case strings.HasPrefix(name, "."), strings.HasSuffix(name, unreadyExt), e.IsDir():
			err = os.RemoveAll(path)
		case strings.HasSuffix(name, sourceExt):
			err = d.sweepTemplate(path)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// sweepTemplate removes an image if it is not of the template that is there now.
func (d *disks) sweepTemplate(source string) error {
	rootfs, err := os.ReadFile(source)
	if err != nil {
		return err
	}
	image := strings.TrimSuffix(source, sourceExt) + imageExt
	if now, err := d.templateImage(string(rootfs)); err == nil && now == image {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	d.log.Info("removing the disk image of a template that is gone", "template", string(rootfs))
	if err := os.Remove(image); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return os.Remove(source)
}

// templateImage names the image of a template. A template is never written; another
// one at the same path is another directory.
func (d *disks) templateImage(rootfs string) (string, error) {
	var st unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, rootfs, 0, unix.STATX_INO|unix.STATX_TYPE|unix.STATX_BTIME, &st); err != nil {
		return "", fmt.Errorf("open root filesystem: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return "", fmt.Errorf("open root filesystem: %s is no directory", rootfs)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s %d %d.%d", rootfs, st.Ino, st.Btime.Sec, st.Btime.Nsec))
	return filepath.Join(d.dir, hex.EncodeToString(sum[:16])+imageExt), nil
}

// template gives the image of the template whose root filesystem is in the
// directory rootfs.
func (d *disks) template(ctx context.Context, rootfs string) (string, error) {
	path, err := d.templateImage(rootfs)
	if err != nil {
		return "", err
	}
	return d.once(ctx, path, func(ctx context.Context) error {
		d.log.Info("making the disk image of a template", "template", rootfs)
		if err := os.WriteFile(strings.TrimSuffix(path, imageExt)+sourceExt, []byte(rootfs), 0o600); err != nil {
			return err
		}
		return disk.MakeExt4(ctx, rootfs, path)
	})
}

// agent gives the image that holds the guest agent at init, as its only file.
func (d *disks) agent(ctx context.Context, init string) (string, error) {
	f, err := os.Open(init)
	if err != nil {
		return "", fmt.Errorf("open guest agent: %w", err)
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, f); err != nil {
		return "", fmt.Errorf("read guest agent: %w", err)
	}
	path := filepath.Join(d.dir, "agent-"+hex.EncodeToString(hash.Sum(nil)[:16])+imageExt)
	return d.once(ctx, path, func(ctx context.Context) (err error) {
		dir, err := os.MkdirTemp(d.dir, "agent-")
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
		if err := copyProgram(filepath.Join(dir, "envd"), init); err != nil {
			return err
		}
		unready := path + unreadyExt
		if err := disk.MakeExt4(ctx, dir, unready); err != nil {
			return err
		}
		if err := os.Chmod(unready, 0o444); err != nil { // each monitor is another user
			return err
		}
		return os.Rename(unready, path)
	})
}

// once makes the image at path unless it is there. Who asks at the same time waits
// for the same work, which ends only when all of them have gone... by the context of
// the first.
func (d *disks) once(ctx context.Context, path string, make func(context.Context) error) (string, error) {
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	made := d.making.DoChan(path, func() (any, error) {
		if _, err := os.Stat(path); err == nil {
			return nil, nil
		}
		// Not broken off with the first who asked: others may wait for it, and the
		// next one would begin anew.
		return nil, make(context.WithoutCancel(ctx))
	})
	select {
	case r := <-made:
		if r.Err != nil {
			return "", fmt.Errorf("make disk image: %w", r.Err)
		}
		return path, nil
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// copyProgram copies a file, to be executed.
func copyProgram(to, from string) error {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}
