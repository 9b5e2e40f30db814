package gvisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// load makes an instance from an image.
func (r *Runtime) load(ctx context.Context, cfg runtime.Config, image runtime.Image, m manifest) error {
	// The guest is shown the memory limit that there is when the engine starts,
	// which is below what the engine may need to load a large image.
	large := m.loading() > cfg.Resources.MemoryMiB<<20/2
	if image.Kind == runtime.ImageFiles {
		return r.loadFiles(ctx, cfg, image.Dir, large)
	}
	if large {
		if err := r.runsc(ctx, cfg, "create", "--bundle="+cfg.Dir); err != nil {
			return err
		}
		if err := r.liftMemory(cfg.ID, cfg.Resources.MemoryMiB); err != nil {
			return err
		}
	}
	return unloadable("restoring container",
		r.runsc(ctx, cfg, "restore", "--detach", "--bundle="+cfg.Dir, "--image-path="+image.Dir))
}

// unloadable makes an error of runsc's one about the image, if it has the words
// for the step in which the engine reads that.
func unloadable(step string, err error) error {
	if err == nil || !strings.Contains(err.Error(), step) {
		return err
	}
	return &sandbox.Error{Kind: sandbox.ErrInvalid, Message: "the image cannot be used: the engine cannot load it", Cause: err}
}

func (r *Runtime) loadFiles(ctx context.Context, cfg runtime.Config, dir string, large bool) error {
	const step = "setupFS"
	if !large {
		return unloadable(step, r.runsc(ctx, cfg, "run", "--detach", "--bundle="+cfg.Dir, "--fs-restore-image-path="+dir))
	}
	// The engine reads the tree into memory as soon as it runs, and so gets it from
	// a pipe, when its limit is lifted.
	held := filepath.Join(cfg.Dir, heldImage)
	defer os.RemoveAll(held)
	pipe, err := holdTree(dir, held)
	if err != nil {
		return fmt.Errorf("prepare image: %w", err)
	}
	defer pipe.Close()
	if err := r.runsc(ctx, cfg, "create", "--bundle="+cfg.Dir, "--fs-restore-image-path="+held); err != nil {
		return err
	}
	if err := r.liftMemory(cfg.ID, cfg.Resources.MemoryMiB); err != nil {
		return err
	}
	fed := make(chan error)
	go func() { fed <- feed(pipe, filepath.Join(dir, treeFile)) }()
	err = r.runsc(ctx, cfg, "start")
	_ = pipe.SetWriteDeadline(time.Now()) // nobody reads any more
	if ferr := <-fed; err == nil {
		err = ferr
	}
	return unloadable(step, err)
}

// holdTree makes held look like the image in dir, but with a pipe for the tree. It
// returns the end that is written to.
func holdTree(dir, held string) (*os.File, error) {
	if err := os.Mkdir(held, 0o700); err != nil {
		return nil, err
	}
	for _, name := range imageFiles(runtime.ImageFiles) {
		if name == treeFile {
			continue
		}
		if err := os.Symlink(filepath.Join(dir, name), filepath.Join(held, name)); err != nil {
			return nil, err
		}
	}
	path := filepath.Join(held, treeFile)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, err
	}
	// Opened for both, it waits for nobody, and neither does who opens it later.
	return os.OpenFile(path, os.O_RDWR, 0)
}

// feed writes the file to the pipe and ends it.
func feed(pipe *os.File, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(pipe, f)
	return errors.Join(err, pipe.Close())
}
