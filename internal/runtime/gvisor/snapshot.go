package gvisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Snapshot implements runtime.Instance.
func (i *instance) Snapshot(ctx context.Context, image runtime.Image, pause bool) (err error) {
	if image.Kind != runtime.ImageMemory && image.Kind != runtime.ImageFiles {
		return sandbox.Errorf(sandbox.ErrInvalid, "there is no kind %q of image", image.Kind)
	}
	i.snapshots.Lock()
	defer i.snapshots.Unlock()
	defer func() {
		if err != nil {
			err = fmt.Errorf("snapshot sandbox %s: %w", i.ID, err)
		}
	}()
	if err := ctx.Err(); err != nil {
		return err
	}
	if pause {
		// What was begun is ended, also when nobody waits any more.
		ctx := context.WithoutCancel(ctx)
		defer func() {
			if err != nil {
				err = errors.Join(err, i.resume(ctx))
			}
		}()
		if err := i.pause(ctx); err != nil {
			return err
		}
	}
	if err := i.rt.liftMemory(i.ID, i.state.MemoryMiB); err != nil {
		return i.MeasureError(err)
	}
	err = i.writeImage(image)
	if !pause {
		err = errors.Join(err, i.rt.settleMemory(i.ID, i.state.MemoryMiB))
	}
	return errors.Join(err, ctx.Err())
}

// writeImage lets the engine write the image, for which it stops the guest by
// itself. It takes no context: the engine cannot be told to break off.
func (i *instance) writeImage(image runtime.Image) error {
	ctx := context.Background()
	need, err := i.imageSize(image.Kind)
	if err != nil {
		return err
	}
	files, err := createImageFiles(image, need)
	if err != nil {
		closeAll(files)
		return err
	}
	if image.Kind == runtime.ImageFiles {
		err = i.call(ctx, methodSaveFiles, struct{}{}, nil, files...)
	} else {
		err = i.call(ctx, methodCheckpoint, map[string]any{
			"metadata":        map[string]string{"compression": "none"},
			"have_pages_file": true,
			"Resume":          true,
		}, nil, files...)
	}
	if err = errors.Join(err, finishImageFiles(files)); err != nil {
		// The engine tells only in words why it could not write.
		if errors.Is(err, unix.ENOSPC) || strings.Contains(err.Error(), unix.ENOSPC.Error()) {
			return diskFull(image.Dir, need)
		}
		return err
	}
	if err := checkFree(image.Dir, spareDisk); err != nil {
		return err // a write may have failed without the engine's telling
	}
	return i.sealImage(image)
}

// spareDisk is how much of the disk has to be free after an image was written.
const spareDisk = 1 << 20

func (i *instance) sealImage(image runtime.Image) error {
	m := manifest{Kind: image.Kind, Version: i.state.Version, Init: i.state.Init}
	if err := writeManifest(image.Dir, m); err != nil {
		if errors.Is(err, unix.ENOSPC) {
			return diskFull(image.Dir, spareDisk)
		}
		return fmt.Errorf("write image: %w", err)
	}
	return nil
}

// imageSize is how much an image will need at most: what the guest has in memory
// and in the overlay's upper layer, which are files without names that the engine
// holds, and something for what is added until it is written.
func (i *instance) imageSize(kind runtime.ImageKind) (int64, error) {
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", i.state.Engine.PID))
	if err != nil {
		return 0, err
	}
	layer := filepath.Join(i.state.Dir, "runsc-filestore-")
	seen := map[uint64]bool{} // by inode
	var bytes int64
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		isMemory := strings.HasPrefix(target, "/memfd:runsc-memory")
		if err != nil || !strings.HasPrefix(target, layer) && !isMemory || isMemory && kind == runtime.ImageFiles {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(fd, &st); err == nil && !seen[st.Ino] {
			seen[st.Ino] = true
			bytes += st.Blocks * 512
		}
	}
	if len(seen) == 0 && i.Engine.Ended() {
		return 0, life.Gone(i.ID)
	}
	return bytes + bytes/8 + 16<<20, nil
}

// Identify implements runtime.Instance: a guest here has nobody to ask.
func (*instance) Identify(context.Context, string, string) error { return nil }

// Resume implements runtime.Instance.
func (i *instance) Resume(ctx context.Context) error {
	i.snapshots.Lock()
	defer i.snapshots.Unlock()
	if err := i.resume(ctx); err != nil {
		return fmt.Errorf("resume sandbox %s: %w", i.ID, err)
	}
	return nil
}

// pause stops all that runs in the guest. The engine counts pauses, and ends
// itself when it is resumed more often than paused. Therefore a file says from
// before a pause until after the resume that the guest may be paused: whatever
// moment the agent is killed at, the next one knows that it has to look.
func (i *instance) pause(ctx context.Context) error {
	if err := os.WriteFile(i.pausedFile(), nil, 0o600); err != nil {
		return fmt.Errorf("pause guest: %w", err)
	}
	return i.call(ctx, methodPause, struct{}{}, nil)
}

// resume lets the guest run if it is paused.
func (i *instance) resume(ctx context.Context) error {
	if _, err := os.Lstat(i.pausedFile()); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	paused, err := i.paused(ctx)
	if err == nil {
		err = i.rt.settleMemory(i.ID, i.state.MemoryMiB)
	}
	if err == nil && paused {
		err = i.call(ctx, methodResume, struct{}{}, nil)
	}
	if err != nil {
		return err
	}
	return os.Remove(i.pausedFile())
}

func (i *instance) pausedFile() string { return filepath.Join(i.state.Dir, pausedFile) }

// paused looks whether the guest is paused, by the stacks of the engine's
// goroutines: each task of the guest has one, and in a pause all of them wait.
func (i *instance) paused(ctx context.Context) (bool, error) {
	for {
		var stacks string
		if err := i.call(ctx, methodStacks, struct{}{}, &stacks); err != nil {
			return false, err
		}
		// An agent that was killed may have left the engine writing an image, for
		// which it pauses the guest as well. It tells nobody when that is over.
		if !strings.Contains(stacks, "/kernel.(*Kernel).SaveTo(") && !strings.Contains(stacks, "/kernel.(*Kernel).FSSave(") {
			return allStopped(stacks), nil
		}
		select {
		case <-ctx.Done():
			return false, context.Cause(ctx)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// allStopped reports whether every task of the guest is stopped.
func allStopped(stacks string) bool {
	tasks := strings.Count(stacks, "/kernel.(*Task).run(")
	return tasks > 0 && strings.Count(stacks, "/kernel.(*Task).doStop(") == tasks
}
