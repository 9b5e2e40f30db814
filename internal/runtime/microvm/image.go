package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/memory"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// manifest is what an image has to say of the machine it was taken of. It is the
// last file of an image to be written.
type manifest struct {
	Kind      runtime.ImageKind `json:"kind"`
	Runtime   string            `json:"runtime"`
	Version   string            `json:"version"` // of monitor and kernel
	CPUs      int               `json:"cpus"`
	MemoryMiB int64             `json:"memoryMiB"`
	CmdLine   string            `json:"cmdline"`
	Agent     string            `json:"agent"` // name of the disk with the guest agent, by its content
	Files     map[string]int64  `json:"files"` // the other files of the image and their sizes
}

// readImage reads an image's manifest and refuses what machine m cannot be made of.
func (r *Runtime) readImage(image runtime.Image, m Machine) (manifest, error) {
	var of manifest
	data, err := os.ReadFile(filepath.Join(image.Dir, imageFile))
	if err == nil {
		err = json.Unmarshal(data, &of)
	}
	if errors.Is(err, fs.ErrNotExist) || errors.As(err, new(*json.SyntaxError)) {
		return of, &sandbox.Error{Kind: sandbox.ErrInvalid, Message: "the image is damaged: what it says of its machine cannot be read", Cause: err}
	}
	if err != nil {
		return of, fmt.Errorf("read image: %w", err)
	}
	// One with memory has the disk as well, as after a loss of power.
	if of.Kind != image.Kind && image.Kind != runtime.ImageFiles {
		return of, sandbox.Errorf(sandbox.ErrInvalid, "the image is damaged: it is one of %q and not of %q", of.Kind, image.Kind)
	}
	for name, size := range of.Files {
		if memory.IsLayer(name) || image.Kind == runtime.ImageFiles && name != diskFile {
			continue // it says itself when it is damaged, or is not needed
		}
		info, err := os.Stat(filepath.Join(image.Dir, filepath.Base(name)))
		if err != nil {
			return of, &sandbox.Error{Kind: sandbox.ErrInvalid, Message: fmt.Sprintf("the image is damaged: its file %s is missing", name), Cause: err}
		}
		if info.Size() != size {
			return of, sandbox.Errorf(sandbox.ErrInvalid, "the image is damaged: its file %s has %d bytes and should have %d", name, info.Size(), size)
		}
	}
	if err := disk.CheckExt4(filepath.Join(image.Dir, diskFile)); err != nil {
		return of, &sandbox.Error{Kind: sandbox.ErrInvalid, Message: "the image is damaged: its disk holds no file system", Cause: err}
	}
	if image.Kind != runtime.ImageMemory {
		return of, nil
	}
	switch {
	case of.Runtime != r.Name() || !r.Loads(of.Version):
		return of, sandbox.Errorf(sandbox.ErrInvalid, "the image was made by %s %s and does not load in %s %s", of.Runtime, of.Version, r.Name(), r.Version())
	case of.CPUs != m.CPUs || of.MemoryMiB != m.MemoryMiB:
		return of, sandbox.Errorf(sandbox.ErrInvalid, "the image is of a machine with other resources")
	case of.Agent != filepath.Base(m.Agent):
		return of, sandbox.Errorf(sandbox.ErrInvalid, "the image is of a machine with another version of the guest agent")
	}
	return of, nil
}

// Snapshot implements runtime.Instance.
func (i *instance) Snapshot(ctx context.Context, image runtime.Image, pause bool) (err error) {
	i.snapshots.Lock()
	defer i.snapshots.Unlock()
	defer func() {
		if err != nil {
			err = fmt.Errorf("snapshot sandbox %s: %w", i.ID, err)
		}
	}()
	m, monitor := i.state.Machine, i.rt.cfg.Monitor
	select {
	case <-i.Done():
		return life.Gone(i.ID)
	default:
	}
	i.endCompaction()
	// A monitor that has not answered in time may be pausing all the same.
	if err = monitor.Pause(ctx, m); err == nil {
		err = i.write(ctx, image)
	}
	if err == nil && pause {
		return nil
	}
	// Also when the caller has gone: it is not the guest's fault.
	resume, cancel := context.WithTimeout(context.WithoutCancel(ctx), life.FreeTime)
	defer cancel()
	err = i.orGone(errors.Join(err, monitor.Resume(resume, m)))
	if err == nil && image.Kind == runtime.ImageMemory {
		i.compact()
	}
	return err
}

// write writes the image of the paused machine.
func (i *instance) write(ctx context.Context, image runtime.Image) error {
	m := i.state.Machine
	if err := disk.Clone(ctx, m.Disk(), filepath.Join(image.Dir, diskFile)); err != nil {
		return fmt.Errorf("clone disk: %w", err)
	}
	if image.Kind == runtime.ImageMemory {
		if err := i.rt.cfg.Monitor.Save(ctx, m, image.Dir); err != nil {
			return err
		}
	}
	files, err := sizes(image.Dir)
	if err != nil {
		return err
	}
	data, err := json.Marshal(manifest{
		Kind: image.Kind, Runtime: i.rt.Name(), Version: i.rt.Version(),
		CPUs: m.CPUs, MemoryMiB: m.MemoryMiB, CmdLine: m.CmdLine, Agent: filepath.Base(m.Agent), Files: files,
	})
	if err != nil {
		return err
	}
	return disk.Full(os.WriteFile(filepath.Join(image.Dir, imageFile), data, 0o600))
}

// sizes are those of the files in a directory that stay as they are.
func sizes(dir string) (map[string]int64, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	files := map[string]int64{}
	for _, e := range entries {
		if memory.IsLayer(e.Name()) {
			continue // becomes another when it is compressed, and says itself when it is damaged
		}
		if e.Name() == WorkingSet {
			continue // as it does
		}
		info, err := e.Info()
		if err != nil {
			return nil, err
		}
		files[e.Name()] = info.Size()
	}
	return files, nil
}

// Identify implements runtime.Instance.
func (i *instance) Identify(ctx context.Context, sandboxID, templateID string) error {
	if err := i.rt.cfg.Monitor.Identify(ctx, i.state.Machine, sandboxID, templateID); err != nil {
		return fmt.Errorf("identify sandbox %s: %w", i.ID, i.orGone(err))
	}
	return nil
}

// Resume implements runtime.Instance.
func (i *instance) Resume(ctx context.Context) error {
	i.snapshots.Lock()
	defer i.snapshots.Unlock()
	if err := i.rt.cfg.Monitor.Resume(ctx, i.state.Machine); err != nil {
		return fmt.Errorf("resume sandbox %s: %w", i.ID, i.orGone(err))
	}
	return nil
}
