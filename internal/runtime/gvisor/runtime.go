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
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/cgroup"
	"github.com/wrenn/wrenn/internal/runtime"
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
	cgroups cgroup.Trees
	version string

	ctx  context.Context // ends with Close
	stop context.CancelFunc
	work sync.WaitGroup // watchers and clean-ups

	mu      sync.Mutex
	claimed map[sandbox.ID]bool // ids being created just now
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
	cgroups, err := cgroup.Find()
	if err != nil {
		return nil, fmt.Errorf("new gvisor runtime: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	return &Runtime{
		cfg: cfg, cgroups: cgroups, version: engineVersion(cfg.Binary),
		ctx: ctx, stop: stop, claimed: map[sandbox.ID]bool{},
	}, nil
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
	r.stop()
	r.work.Wait()
	if len(r.cgroups.Children(parentGroup(r.cfg.Tag))) > 0 {
		return nil
	}
	return removeTraces(r.cgroups, r.cfg.Root, r.cfg.Tag)
}

// RemoveAll ends every instance of the platform with this root and tag and
// frees all that the runtime holds for it.
func RemoveAll(root, tag string) error {
	cgroups, err := cgroup.Find()
	if err != nil {
		return fmt.Errorf("remove all sandboxes: %w", err)
	}
	ids := cgroups.Children(parentGroup(tag))
	states, _ := filepath.Glob(stateFile(root, "*"))
	for _, path := range states {
		id, _, _ := strings.Cut(filepath.Base(path), "_")
		if !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, id := range ids {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(context.Background(), teardownTime)
			defer cancel()
			return free(ctx, cgroups, root, tag, sandbox.ID(id), "")
		})
	}
	return errors.Join(g.Wait(), removeTraces(cgroups, root, tag))
}

// removeTraces removes what is there once per platform: the parent cgroup, and
// the empty network namespace that runsc keeps mounted for its gofers.
func removeTraces(cgroups cgroup.Trees, root, tag string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	errs := []error{cgroups.Remove(ctx, parentGroup(tag))}
	entries, _ := os.ReadDir(root)
	for _, e := range entries {
		path := filepath.Join(root, e.Name())
		// Creations at the same time can have mounted it more than once.
		for unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
			os.Remove(path) // fails, and is tried again, while a mount is left
		}
	}
	return errors.Join(errs...)
}

func parentGroup(tag string) string               { return "/wrenn-" + tag }
func group(tag string, id sandbox.ID) string      { return filepath.Join(parentGroup(tag), string(id)) }
func stateFile(root string, id sandbox.ID) string { return statePath(root, id, "state") }

// statePath is where runsc keeps what it knows of a container.
func statePath(root string, id sandbox.ID, ext string) string {
	return filepath.Join(root, fmt.Sprintf("%s_sandbox:%s.%s", id, id, ext))
}

// Adopt implements runtime.Runtime.
func (r *Runtime) Adopt(_ context.Context, id sandbox.ID, raw json.RawMessage) (runtime.Instance, error) {
	var st state
	if err := json.Unmarshal(raw, &st); err != nil {
		return nil, &sandbox.Error{Kind: sandbox.ErrInvalid, Message: fmt.Sprintf("the recorded state of sandbox %s is damaged", id), Cause: err}
	}
	if st.Version == "" { // it is from before this was recorded
		st.Version = r.version
	}
	inst, err := r.open(id, st)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s is not running any more", id)
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
	if err := free(ctx, r.cgroups, r.cfg.Root, r.cfg.Tag, id, st.Dir); err != nil {
		return fmt.Errorf("discard sandbox %s: %w", id, err)
	}
	return nil
}

// teardownTime bounds a clean-up: processes end in milliseconds, so this is
// only reached when the host is in deep trouble.
const teardownTime = 30 * time.Second

// free ends and removes everything that an instance of this id may have on the
// host, however much of it is there. dir may be empty when it is not known.
func free(ctx context.Context, cgroups cgroup.Trees, root, tag string, id sandbox.ID, dir string) error {
	if err := cgroups.Kill(ctx, group(tag, id)); err != nil {
		return err
	}
	if err := cgroups.Remove(ctx, group(tag, id)); err != nil {
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
