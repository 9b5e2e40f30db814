package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/memory/pager"
	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// maxState bounds the state of the devices: some tens of KiB.
const maxState = 16 << 20

// Load implements microvm.Monitor.
func (f *Monitor) Load(ctx context.Context, m microvm.Machine, saved string) (id process.ID, err error) {
	image, err := memory.Open(saved)
	if err != nil {
		return id, damaged(err)
	}
	defer image.Close()
	if image.Size() != m.MemoryMiB<<20 {
		return id, sandbox.Errorf(sandbox.ErrInvalid, "the image is damaged: its memory has %d bytes and its machine %d MiB", image.Size(), m.MemoryMiB)
	}
	if err := image.LinkTo(m.Base()); err != nil {
		return id, err
	}
	state, devices := filepath.Join(m.Run(), stateName), filepath.Join(saved, stateName)
	if _, err := os.Lstat(devices); err != nil {
		return id, damaged(err)
	}
	if err := copyFile(state, devices, maxState, m.UID); err != nil {
		return id, err
	}
	defer os.Remove(state)
	backend, done, err := f.backend(ctx, m, image, saved)
	if err != nil {
		return id, err
	}
	defer done()
	id, c, err := f.launch(ctx, m)
	if err != nil {
		return id, err
	}
	defer c.Close()
	load := SnapshotLoad{
		State: runDir + "/" + stateName, Memory: backend, TrackDirty: true,
		Networks: []NetworkOverride{{ID: link, TAP: m.TAP}},
	}
	if err := c.Load(ctx, f.can, load, m.MemoryMiB); err != nil {
		if errors.As(err, new(*Error)) {
			err = &sandbox.Error{Kind: sandbox.ErrInvalid, Message: "the image is damaged: its devices cannot be loaded", Cause: err}
		}
		return id, f.explain(m, err)
	}
	return id, nil
}

// backend prepares what the memory of a machine comes from. done is called once it
// is loaded.
func (f *Monitor) backend(ctx context.Context, m microvm.Machine, image *memory.Image, saved string) (b MemoryBackend, done func(), err error) {
	if f.pager != nil && faultsServed() {
		return f.throughPager(ctx, m, saved)
	}
	path := filepath.Join(m.Run(), memoryName)
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return b, nil, err
	}
	defer file.Close()
	done = func() { os.Remove(path) } // it stays mapped
	if err := errors.Join(image.CopyTo(ctx, file), file.Chown(int(m.UID), int(m.UID))); err != nil {
		done()
		return b, nil, damaged(disk.Full(err))
	}
	return MemoryBackend{Kind: File, Path: runDir + "/" + memoryName}, done, nil
}

// faultsServed reports whether a Firecracker without rights may have page faults of
// the kernel, which KVM's are, served by another process.
func faultsServed() bool {
	if _, err := os.Stat("/dev/userfaultfd"); err == nil {
		return true
	}
	all, err := os.ReadFile("/proc/sys/vm/unprivileged_userfaultfd")
	return err == nil && strings.TrimSpace(string(all)) == "1"
}

func (f *Monitor) throughPager(ctx context.Context, m microvm.Machine, saved string) (b MemoryBackend, done func(), err error) {
	p, err := f.pager.Connect(ctx)
	if err != nil {
		return b, nil, err
	}
	defer p.Close()
	// The image may be gone before anything is recorded, or be used again.
	copySet(m.Base(), saved)
	err = p.Register(ctx, pager.VM{
		ID: string(m.ID), Image: m.Base(), Socket: filepath.Join(m.Run(), uffdName), UID: int(m.UID),
		WorkingSet: filepath.Join(m.Base(), microvm.WorkingSet), Copy: filepath.Join(saved, microvm.WorkingSet),
		Budget: m.MemoryMiB << 20, ReasonFile: m.Reason(),
	})
	return MemoryBackend{Kind: Uffd, Path: runDir + "/" + uffdName}, func() {}, err
}

// copySet gives the directory of an image another's working set. Without it a resume
// is slower, and nothing else.
func copySet(to, from string) {
	if blocks, err := pager.ReadWorkingSet(filepath.Join(from, microvm.WorkingSet)); err == nil {
		_ = pager.WriteWorkingSet(filepath.Join(to, microvm.WorkingSet), blocks)
	}
}

// saveSet gives an image the working set that the machine was loaded with, or that was
// recorded since. What is touched to write the image is none of it.
func (f *Monitor) saveSet(ctx context.Context, m microvm.Machine, to string) {
	if _, err := os.Stat(m.Base()); err != nil || f.pager == nil || !faultsServed() {
		return // it came from no pager
	}
	asking, cancel := context.WithTimeout(ctx, pagerLimit)
	defer cancel()
	if p, err := f.pager.Connect(asking); err == nil {
		_ = p.FinishRecording(asking, string(m.ID)) // else what was written before is taken
		p.Close()
	}
	copySet(to, m.Base())
}

// pagerLimit is how long a pause or a stop waits for the pager, which may hang.
const pagerLimit = 3 * time.Second

// Watch implements microvm.Monitor.
func (f *Monitor) Watch(ctx context.Context, log *slog.Logger) {
	if f.pager != nil {
		f.pager.Watch(ctx, log)
	}
}

// Ended implements microvm.Monitor.
func (f *Monitor) Ended(ctx context.Context, id sandbox.ID) error {
	if f.cfg.PagerSocket == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, pagerLimit)
	defer cancel()
	return pager.Drop(ctx, f.cfg.PagerSocket, string(id))
}

// damaged gives an error about what is in an image its kind. It is for nothing else:
// images are thrown away for it.
func damaged(err error) error {
	if errors.Is(err, memory.ErrDamaged) || errors.Is(err, os.ErrNotExist) {
		return &sandbox.Error{Kind: sandbox.ErrInvalid, Message: "the image is damaged: it is not what was written", Cause: err}
	}
	return err
}

// Spare implements microvm.Monitor.
func (*Monitor) Spare(m microvm.Machine, _ bool) int64 { return microvm.Spare(m) }

// Save implements microvm.Monitor. The first time all memory is written, afterwards
// what has changed since the image that is in the machine's base.
func (f *Monitor) Save(ctx context.Context, m microvm.Machine, to string) error {
	f.saveSet(ctx, m, to)
	parent, err := f.takeBase(m)
	if err != nil {
		return err
	}
	s := SnapshotCreate{Kind: Full, State: runDir + "/" + stateName, Memory: runDir + "/" + memoryName}
	if parent != nil {
		defer parent.Close()
		s.Kind = Diff
	}
	written := filepath.Join(m.Run(), memoryName)
	// A Firecracker that was taken over may have put something else there. Directories it
	// could fill faster than they are emptied: they are in the way of its own image.
	for _, path := range []string{written, filepath.Join(m.Run(), stateName)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		defer os.Remove(path)
	}
	if err := with(m, func(c *Client) error { return c.CreateSnapshot(ctx, s, m.MemoryMiB) }); err != nil {
		if e := new(Error); errors.As(err, &e) && strings.Contains(e.Message, "No space left") {
			return &sandbox.Error{Kind: sandbox.ErrExhausted, Message: "the host's disk is full", Cause: err}
		}
		return err
	}
	if err := copyFile(filepath.Join(to, stateName), filepath.Join(m.Run(), stateName), maxState, 0); err != nil {
		return disk.Full(err)
	}
	file, err := microvm.OpenPlain(written)
	if err != nil {
		return err
	}
	defer file.Close()
	size := m.MemoryMiB << 20
	if info, err := file.Stat(); err != nil || info.Size() != size {
		return errors.Join(errors.New("firecracker writes a memory of another size"), err)
	}
	if err := memory.Write(ctx, to, size, parent, memory.SparseFile{File: file, Size: size}); err != nil {
		return disk.Full(fmt.Errorf("save memory: %w", err))
	}
	image, err := memory.Open(to)
	if err != nil {
		return err
	}
	defer image.Close()
	if parent == nil {
		return nil // what the machine writes from here on is not noted, so the next is whole too
	}
	if err := os.RemoveAll(m.Base()); err != nil {
		return err
	}
	if err := image.LinkTo(m.Base()); err != nil {
		return err
	}
	copySet(m.Base(), to)
	return nil
}

// staleName is a file in a machine's base that says that Firecracker has begun to note
// anew what is written: what it notes is not what was written since that image.
const staleName = "stale"

// takeBase opens the image since which Firecracker notes what is written, and marks it
// as stale. nil: there is none.
func (f *Monitor) takeBase(m microvm.Machine) (*memory.Image, error) {
	const untilWrong = 3 << 10 // MiB, where snapshots of what has changed are not whole
	if m.MemoryMiB > untilWrong && !f.can.DiffAbove3GiB {
		return nil, nil
	}
	stale := filepath.Join(m.Base(), staleName)
	if _, err := os.Stat(stale); err == nil {
		return nil, nil
	}
	image, err := memory.Open(m.Base())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(stale, nil, 0o600); err != nil {
		image.Close()
		return nil, err
	}
	return image, nil
}

// copyFile copies a file of no more than limit bytes, which may be one that a
// Firecracker that was taken over has made.
func copyFile(to, from string, limit int64, uid uint32) error {
	src, err := microvm.OpenPlain(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(dst, io.LimitReader(src, limit+1))
	if err == nil && n > limit {
		err = fmt.Errorf("%s has more than %d bytes", filepath.Base(from), limit)
	}
	return errors.Join(err, dst.Chown(int(uid), int(uid)), dst.Sync(), dst.Close())
}
