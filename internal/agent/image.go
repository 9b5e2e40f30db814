package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// manifest says what an image is and what whole it is: manifest.json beside the
// runtime's files. It is written last.
type manifest struct {
	Kind           runtime.ImageKind `json:"kind"`
	Runtime        string            `json:"runtime"`
	RuntimeVersion string            `json:"runtime_version"`
	GuestInit      string            `json:"guest_init"` // file name of the guest agent's binary, which the memory refers to
	TemplateID     string            `json:"template_id"`
	BuildID        string            `json:"build_id"`
	Resources      sandbox.Resources `json:"resources"`
	EnvdVersion    string            `json:"envd_version"`
	// EnvVars are what the sandbox's creator set: a boot from files needs them
	// again. They may hold secrets, as the memory does; nobody but root reads it.
	EnvVars map[string]string `json:"env_vars,omitempty"`
	Files   map[string]int64  `json:"files"` // sizes in bytes
	Bytes   int64             `json:"bytes"` // that the image takes on disk, without what it shares with others
	Created time.Time         `json:"created"`

	Compressed bool `json:"compressed,omitempty"` // a smaller image has been made of it
}

const manifestFile = "manifest.json"

// image is an instance on disk, checked.
type image struct {
	manifest
	dir string
}

// bytes is what the image takes on disk.
func (im image) bytes() (n int64) {
	if im.Bytes > 0 {
		return im.Bytes
	}
	for _, size := range im.Files {
		n += size
	}
	return n
}

func (im image) runtime() runtime.Image { return runtime.Image{Dir: im.dir, Kind: im.Kind} }

// beside is where an image is written before it is renamed to dir.
func beside(dir string) string {
	return filepath.Join(filepath.Dir(dir), ".new-"+filepath.Base(dir))
}

// newImage makes the directory beside dir that an image is written into. What a
// killed agent left there goes.
func newImage(dir string) (tmp string, err error) {
	tmp = beside(dir)
	if err := os.RemoveAll(tmp); err != nil {
		return "", fmt.Errorf("make image directory: %w", err)
	}
	if err := os.Mkdir(tmp, 0o700); err != nil {
		return "", fmt.Errorf("make image directory: %w", err)
	}
	return tmp, nil
}

// seal makes the files beside dir an image there: on the disk, whole, or not at
// all. On failure what was written is still beside, for the caller to remove.
func seal(dir string, m manifest) (image, error) {
	im, err := writeImage(beside(dir), m)
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return im, &sandbox.Error{Kind: sandbox.ErrExhausted, Message: "the host's disk is full", Cause: err}
	case err != nil:
		return im, fmt.Errorf("write image: %w", err)
	}
	if err := errors.Join(os.Rename(im.dir, dir), syncPath(filepath.Dir(dir))); err != nil {
		return im, fmt.Errorf("write image: %w", err)
	}
	im.dir = dir
	return im, nil
}

func writeImage(dir string, m manifest) (image, error) {
	im := image{manifest: m, dir: dir}
	im.Files, im.Created = map[string]int64{}, time.Now()
	entries, err := os.ReadDir(dir)
	if err != nil {
		return im, err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			return im, err
		}
		im.Files[e.Name()] = info.Size()
		path := filepath.Join(dir, e.Name())
		if err := syncPath(path); err != nil {
			return im, err
		}
		own, err := disk.OwnBytes(path)
		if err != nil {
			return im, err
		}
		im.Bytes += own
	}
	data, err := json.Marshal(im.manifest)
	if err != nil {
		return im, err
	}
	if err := os.WriteFile(filepath.Join(dir, manifestFile), data, 0o600); err != nil {
		return im, err
	}
	return im, errors.Join(syncPath(filepath.Join(dir, manifestFile)), syncPath(dir))
}

// loads refuses an image whose memory this version of the engine does not load, or
// not without the guest agent's binary, which the memory refers to.
func (im image) loads(rt runtime.Runtime, guestInit string) error {
	if im.Kind != runtime.ImageMemory {
		return nil
	}
	if _, err := os.Stat(guestInit); err != nil {
		return &sandbox.Error{Kind: sandbox.ErrInvalid, Message: "the image cannot be loaded: its guest agent is gone from this host; let the sandbox start anew from its files (wrenn sandbox resume --cold)", Cause: err}
	}
	if rt.Loads(im.RuntimeVersion) {
		return nil
	}
	return sandbox.Errorf(sandbox.ErrInvalid, "the image was made by %s %s and cannot be loaded by %s %s: start the platform with what made it, or let the sandbox start anew from its files (wrenn sandbox resume --cold)",
		im.Runtime, im.RuntimeVersion, rt.Name(), rt.Version())
}

// openImage reads an image and checks that it is whole and of this engine. What
// it refuses is sandbox.ErrInvalid with words for the user, and what is not there
// sandbox.ErrNotFound.
func openImage(dir string, rt runtime.Runtime) (image, error) {
	im := image{dir: dir}
	data, err := os.ReadFile(filepath.Join(dir, manifestFile))
	if errors.Is(err, fs.ErrNotExist) {
		return im, sandbox.Errorf(sandbox.ErrNotFound, "there is no such image on this host")
	}
	if err != nil {
		return im, fmt.Errorf("read image: %w", err)
	}
	if err := json.Unmarshal(data, &im.manifest); err != nil {
		return im, &sandbox.Error{Kind: sandbox.ErrInvalid, Message: "the image is damaged: its manifest cannot be read", Cause: err}
	}
	if im.Runtime != rt.Name() {
		return im, sandbox.Errorf(sandbox.ErrInvalid, "the image was made by %s and cannot be loaded by %s", im.Runtime, rt.Name())
	}
	for name, size := range im.Files {
		switch info, err := os.Stat(filepath.Join(dir, filepath.Base(name))); {
		case errors.Is(err, fs.ErrNotExist):
			return im, sandbox.Errorf(sandbox.ErrInvalid, "the image is damaged: its file %s is missing", name)
		case err != nil:
			return im, fmt.Errorf("check image: %w", err)
		case info.Size() != size:
			return im, sandbox.Errorf(sandbox.ErrInvalid, "the image is damaged: its file %s has %d bytes and should have %d", name, info.Size(), size)
		}
	}
	return im, nil
}

// unusable makes of an error about what a paused sandbox needs to go on one of a
// conflict, with the same words. The sandbox is there, which sandbox.ErrNotFound
// would deny, and it is not the caller's input that is wrong.
func unusable(err error) error {
	if kind := sandbox.Kind(err); !errors.Is(kind, sandbox.ErrInvalid) && !errors.Is(kind, sandbox.ErrNotFound) {
		return err
	}
	text, _ := sandbox.Message(err)
	return &sandbox.Error{Kind: sandbox.ErrConflict, Message: text, Cause: errors.New(err.Error())} // without its kind
}

// copyTo makes a second image of the same files, which are never written again.
func (im image) copyTo(dir string) (image, error) {
	tmp, err := newImage(dir)
	if err != nil {
		return image{}, err
	}
	for name := range im.Files {
		if err := os.Link(filepath.Join(im.dir, name), filepath.Join(tmp, name)); err != nil {
			return image{}, errors.Join(fmt.Errorf("copy image: %w", err), os.RemoveAll(tmp))
		}
	}
	copied, err := seal(dir, im.manifest)
	if err != nil {
		err = errors.Join(err, os.RemoveAll(tmp))
	}
	return copied, err
}

// removeImage removes an image, so that what is left of it after a kill is none.
func removeImage(dir string) error {
	if err := os.Remove(filepath.Join(dir, manifestFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove image: %w", err)
	}
	if err := errors.Join(os.RemoveAll(dir), os.RemoveAll(beside(dir)), os.RemoveAll(smaller(dir))); err != nil {
		return fmt.Errorf("remove image: %w", err)
	}
	return nil
}

// syncPath writes a file or a directory through to the disk.
func syncPath(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}
