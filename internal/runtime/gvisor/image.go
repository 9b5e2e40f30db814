package gvisor

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// The files of an image. The engine fixes the names, but for the last.
const (
	kernelFile   = "checkpoint.img"  // the sandbox kernel: processes, open files, sockets
	layerFile    = "fscheckpoint.pb" // of an image of files: what the next two have
	treeFile     = "multitar.img"    // of an image of files: all but contents
	pageMapFile  = "pages_meta.img"  // where which page belongs
	pagesFile    = "pages.img"       // memory, and contents of files in the overlay's upper layer
	manifestFile = "image.json"      // what the others have to be; written last
)

// imageFiles are the files of an image that the engine writes, in its order.
func imageFiles(kind runtime.ImageKind) []string {
	if kind == runtime.ImageFiles {
		return []string{layerFile, treeFile, pageMapFile, pagesFile}
	}
	return []string{kernelFile, pageMapFile, pagesFile}
}

// manifest is the content of manifestFile: what an image that is whole has.
type manifest struct {
	Kind    runtime.ImageKind `json:"kind"`
	Version string            `json:"version"` // of the engine
	Init    int64             `json:"init"`    // size of the guest agent, which runs on and must be the same
	Sizes   map[string]int64  `json:"sizes"`   // of the other files
}

// writeManifest ends the writing of an image.
func writeManifest(dir string, m manifest) error {
	m.Sizes = map[string]int64{}
	for _, name := range imageFiles(m.Kind) {
		fi, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			return err
		}
		m.Sizes[name] = fi.Size()
	}
	data, err := json.Marshal(m)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, manifestFile), data, 0o600)
}

// checkImage refuses an image that is not whole or not for this engine. Only the
// engine sees whether the contents are right.
func checkImage(image runtime.Image, version string, initSize int64) (manifest, error) {
	refuse := func(format string, args ...any) (manifest, error) {
		return manifest{}, sandbox.Errorf(sandbox.ErrInvalid, "the image cannot be used: "+format, args...)
	}
	data, err := os.ReadFile(filepath.Join(image.Dir, manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return refuse("it was not written to the end")
	}
	if err != nil {
		return manifest{}, fmt.Errorf("read image: %w", err)
	}
	var m manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return refuse("its %s is damaged", manifestFile)
	}
	if m.Kind != image.Kind {
		return refuse("it is one of %s, not of %s", m.Kind, image.Kind)
	}
	for _, name := range imageFiles(m.Kind) {
		fi, err := os.Stat(filepath.Join(image.Dir, name))
		switch want, known := m.Sizes[name]; {
		case errors.Is(err, fs.ErrNotExist):
			return refuse("its file %s is missing", name)
		case err != nil:
			return manifest{}, fmt.Errorf("read image: %w", err)
		case !known || fi.Size() != want:
			return refuse("its file %s has %d bytes and should have %d", name, fi.Size(), want)
		}
	}
	if m.Kind == runtime.ImageFiles {
		return m, nil // whose format has a version of its own, which the engine checks
	}
	if m.Version != version {
		return refuse("it is of version %s of gvisor, this is version %s", m.Version, version)
	}
	if m.Init != initSize {
		return refuse("it was taken with another guest agent (%d bytes, now %d)", m.Init, initSize)
	}
	return m, nil
}

// loading is how much memory the engine takes at most to load the image. Contents
// of files do not count in it, but are not told from memory.
func (m manifest) loading() int64 {
	const decoded = 8 // times what it is in the image
	bytes := decoded * (m.Sizes[kernelFile] + m.Sizes[treeFile] + m.Sizes[pageMapFile])
	if m.Kind == runtime.ImageMemory {
		bytes += m.Sizes[pagesFile]
	}
	return bytes
}

// createImageFiles opens the files for the engine to write, with room for bytes
// in the largest of them.
func createImageFiles(image runtime.Image, bytes int64) (files []*os.File, err error) {
	defer func() {
		if err != nil {
			closeAll(files)
		}
	}()
	for _, name := range imageFiles(image.Kind) {
		f, err := os.OpenFile(filepath.Join(image.Dir, name), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
		if err != nil {
			return files, fmt.Errorf("create image: %w", err)
		}
		files = append(files, f)
	}
	return files, errors.Join(reserve(files[len(files)-1], bytes))
}

// reserve takes room on the disk for the file, so that nobody else can take it
// while the engine writes.
func reserve(f *os.File, bytes int64) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, 0, bytes)
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return diskFull(filepath.Dir(f.Name()), bytes)
	case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS): // then only what is free can be looked at
		return checkFree(filepath.Dir(f.Name()), bytes)
	case err != nil:
		return fmt.Errorf("reserve %d bytes for an image: %w", bytes, err)
	}
	return nil
}

// finishImageFiles gives back what the files do not need of their room, and
// closes them.
func finishImageFiles(files []*os.File) error {
	var errs []error
	for _, f := range files {
		fi, err := f.Stat()
		if err == nil {
			err = f.Truncate(fi.Size())
		}
		errs = append(errs, err, f.Close())
	}
	return errors.Join(errs...)
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// checkFree refuses when the file system of dir has fewer bytes free.
func checkFree(dir string, bytes int64) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("measure free disk: %w", err)
	}
	if int64(st.Bavail)*st.Bsize < bytes {
		return diskFull(dir, bytes)
	}
	return nil
}

func diskFull(dir string, bytes int64) error {
	return &sandbox.Error{
		Kind:    sandbox.ErrExhausted,
		Message: fmt.Sprintf("the host's disk is full: an image needs %d MiB; delete snapshots and sandboxes that are not needed", bytes>>20+1),
		Cause:   fmt.Errorf("measured at %s", dir),
	}
}
