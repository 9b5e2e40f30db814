// Package gvisor runs sandboxes on gVisor: a kernel in user space, started from
// a copy of this very binary (see package runsc), that needs no KVM.
//
// An instance is two host processes that do not depend on the agent's: the
// sandbox kernel ("engine"), whose children are the guest's address spaces, and
// the gofer that opens the template's files for it. Both sit in the cgroup
// /wrenn-<tag>/<id> from their first instruction on, so whatever an instance
// may have left is found by its cgroup.
package gvisor

import (
	"context"
	"debug/buildinfo"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Config is what the runtime works with.
type Config struct {
	Binary string // absolute path of the binary to execute as runsc, from InstallBinary
	Root   string // directory for runsc's state; made if missing
	Tag    string // tells this platform's cgroups from other platforms' on the host
	Log    *slog.Logger
}

// Runtime makes gVisor instances. It implements runtime.Runtime.
type Runtime struct {
	cfg     Config
	set     *life.Set
	version string
}

var _ runtime.Runtime = (*Runtime)(nil)

// New prepares the runtime. It starts nothing; Probe says whether it works here.
func New(cfg Config) (*Runtime, error) {
	if cfg.Tag == "" || !filepath.IsAbs(cfg.Binary) || !filepath.IsAbs(cfg.Root) {
		return nil, fmt.Errorf("new gvisor runtime: need absolute paths and a tag, got binary %q, root %q, tag %q", cfg.Binary, cfg.Root, cfg.Tag)
	}
	if err := os.MkdirAll(cfg.Root, 0o711); err != nil {
		return nil, fmt.Errorf("new gvisor runtime: %w", err)
	}
	set, err := life.OpenSet(cfg.Tag)
	if err != nil {
		return nil, fmt.Errorf("new gvisor runtime: %w", err)
	}
	return &Runtime{cfg: cfg, set: set, version: engineVersion(cfg.Binary)}, nil
}

// Name implements runtime.Runtime.
func (*Runtime) Name() string { return "gvisor" }

// Version implements runtime.Runtime: the version of gVisor in the binary.
func (r *Runtime) Version() string { return r.version }

// Binary is the path of the program that runs the sandboxes.
func (r *Runtime) Binary() string { return r.cfg.Binary }

func engineVersion(binary string) string {
	info, err := buildinfo.ReadFile(binary)
	if err != nil {
		return "unknown"
	}
	for _, dep := range info.Deps {
		if dep.Path == "gvisor.dev/gvisor" {
			return dep.Version
		}
	}
	return "unknown"
}

// Close ends what the runtime does in this process. Instances that run go on; if
// there is none, the runtime's traces on the host go too.
func (r *Runtime) Close() error {
	r.set.Close()
	if len(r.set.IDs()) > 0 {
		return nil
	}
	return removeTraces(r.set, r.cfg.Root)
}

// RemoveAll ends every instance of the platform with this root and tag and
// frees all that the runtime holds for it.
func RemoveAll(root, tag string) error {
	set, err := life.OpenSet(tag)
	if err != nil {
		return fmt.Errorf("remove all sandboxes: %w", err)
	}
	defer set.Close()
	ids := set.IDs()
	states, _ := filepath.Glob(stateFile(root, "*"))
	for _, path := range states {
		id, _, _ := strings.Cut(filepath.Base(path), "_")
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	err = life.FreeAll(ids, func(ctx context.Context, id sandbox.ID) error { return free(ctx, set, root, id, "") })
	return errors.Join(err, removeTraces(set, root))
}

// removeTraces removes what is there once per platform: the parent cgroup, and
// the empty network namespace that runsc keeps mounted for its gofers.
func removeTraces(set *life.Set, root string) error {
	err := set.RemoveParent()
	entries, _ := os.ReadDir(root)
	for _, e := range entries {
		path := filepath.Join(root, e.Name())
		// Creations at the same time can have mounted it more than once.
		for unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
			os.Remove(path) // fails, and is tried again, while a mount is left
		}
	}
	return err
}

func stateFile(root string, id sandbox.ID) string { return statePath(root, id, "state") }

// statePath is where runsc keeps what it knows of a container.
func statePath(root string, id sandbox.ID, ext string) string {
	return filepath.Join(root, fmt.Sprintf("%s_sandbox:%s.%s", id, id, ext))
}

// Adopt implements runtime.Runtime.
func (r *Runtime) Adopt(_ context.Context, id sandbox.ID, raw json.RawMessage) (runtime.Instance, error) {
	var st state
	if err := life.ReadState(id, raw, &st); err != nil {
		return nil, err
	}
	if st.Version == "" { // it is from before this was recorded
		st.Version = r.version
	}
	inst, err := r.open(id, st)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, life.Gone(id)
	}
	if err != nil {
		return nil, fmt.Errorf("adopt sandbox %s: %w", id, err)
	}
	return inst, nil
}

// Loads implements runtime.Runtime.
func (r *Runtime) Loads(version string) bool { return version == r.Version() }

// Compress implements runtime.Runtime.
func (r *Runtime) Compress(context.Context, runtime.Image, string) error {
	return errors.ErrUnsupported
}

// Discard implements runtime.Runtime.
func (r *Runtime) Discard(ctx context.Context, id sandbox.ID, raw json.RawMessage) error {
	if _, err := sandbox.ParseID(string(id)); err != nil {
		return err
	}
	var st state
	if len(raw) > 0 {
		if err := json.Unmarshal(raw, &st); err != nil {
			r.cfg.Log.Warn("discarding without the recorded state", "sandbox", id, "err", err)
		}
	}
	if err := free(ctx, r.set, r.cfg.Root, id, st.Dir); err != nil {
		return fmt.Errorf("discard sandbox %s: %w", id, err)
	}
	return nil
}

// free ends and removes everything that an instance of this id may have on the
// host, however much of it is there. dir may be empty when it is not known.
func free(ctx context.Context, set *life.Set, root string, id sandbox.ID, dir string) error {
	if err := set.EndGroup(ctx, id); err != nil {
		return err
	}
	paths := []string{stateFile(root, id), statePath(root, id, "lock")}
	// runsc puts its socket into the first of these where the path is short
	// enough for a socket.
	for _, d := range []string{root, "/var/run", "/run", "/tmp"} {
		paths = append(paths, filepath.Join(d, fmt.Sprintf("runsc-%s.sock", id)))
	}
	if dir != "" {
		for _, name := range instanceFiles {
			paths = append(paths, filepath.Join(dir, name))
		}
		// The overlay's file has a name only until runsc has opened it.
		unnamed, _ := filepath.Glob(filepath.Join(dir, "runsc-filestore-*"))
		paths = append(paths, unnamed...)
	}
	var errs []error
	if dir != "" {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, heldImage)))
	}
	for _, path := range paths {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
