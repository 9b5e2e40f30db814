// Package microvm runs each sandbox in a virtual machine with a Linux kernel of its
// own. What Firecracker and QEMU share is here: disks, the jail's user and cgroup,
// the guest's kernel, images, adoption and the end; what differs is a Monitor.
//
// An instance is one host process, the monitor's, which does not depend on the
// agent's. It sits in the cgroup /wrenn-<tag>/<id> from its first instruction on, so
// whatever an instance may have left is found by its cgroup and its directory.
package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Config is what the runtime works with.
type Config struct {
	Monitor Monitor
	Kernel  kernel.Kernel // what guests boot
	Disks   string        // directory for templates as disk images; made if missing, on the filesystem of the instances
	Tag     string        // tells this platform's cgroups and users from other platforms' on the host
	Log     *slog.Logger
}

// Runtime makes virtual machines. It implements runtime.Runtime.
type Runtime struct {
	cfg        Config
	set        *life.Set
	disks      *disks
	compacting chan struct{} // holds a token while memory is compacted
}

var _ runtime.Runtime = (*Runtime)(nil)

// New prepares the runtime, which ends with Close. It starts no machine; Probe says
// whether it works here.
func New(cfg Config) (*Runtime, error) {
	if cfg.Tag == "" || !filepath.IsAbs(cfg.Disks) {
		return nil, fmt.Errorf("new %s runtime: need an absolute path and a tag, got %q, %q", cfg.Monitor.Name(), cfg.Disks, cfg.Tag)
	}
	disks, err := openDisks(cfg.Disks, cfg.Log)
	if err != nil {
		return nil, fmt.Errorf("new %s runtime: %w", cfg.Monitor.Name(), err)
	}
	set, err := life.OpenSet(cfg.Tag)
	if err != nil {
		return nil, fmt.Errorf("new %s runtime: %w", cfg.Monitor.Name(), err)
	}
	set.Go(func() { cfg.Monitor.Watch(set.Context(), cfg.Log) })
	return &Runtime{cfg: cfg, set: set, disks: disks, compacting: make(chan struct{}, 1)}, nil
}

// Name implements runtime.Runtime.
func (r *Runtime) Name() string { return r.cfg.Monitor.Name() }

// Version implements runtime.Runtime: the monitor's and the kernel's of new machines.
func (r *Runtime) Version() string {
	return r.cfg.Monitor.Version() + kernelMark + r.cfg.Kernel.Name
}

const kernelMark = "+linux-"

// Loads implements runtime.Runtime. What the guest's kernel was is in its memory.
func (r *Runtime) Loads(version string) bool {
	monitor, _, _ := strings.Cut(version, kernelMark)
	return monitor == r.cfg.Monitor.Version()
}

// Probe implements runtime.Runtime.
func (r *Runtime) Probe(ctx context.Context) error { return r.cfg.Monitor.Probe(ctx, r.cfg.Kernel) }

// Close ends what the runtime does in this process. Machines that run go on; if
// there is none, the runtime's traces on the host go too.
func (r *Runtime) Close() error {
	r.set.Close()
	if len(r.set.IDs()) > 0 {
		return nil
	}
	return r.set.RemoveParent()
}

// RemoveAll ends every machine of the platform with this tag. Their directories are
// their makers' to remove.
func RemoveAll(tag string) error {
	set, err := life.OpenSet(tag)
	if err != nil {
		return fmt.Errorf("remove all sandboxes: %w", err)
	}
	defer set.Close()
	err = life.FreeAll(set.IDs(), func(ctx context.Context, id sandbox.ID) error { return free(ctx, set, id, "") })
	return errors.Join(err, set.RemoveParent())
}

// Adopt implements runtime.Runtime.
func (r *Runtime) Adopt(_ context.Context, id sandbox.ID, raw json.RawMessage) (runtime.Instance, error) {
	var st state
	if err := life.ReadState(id, raw, &st); err != nil {
		return nil, err
	}
	inst, err := r.open(st)
	if errors.Is(err, os.ErrProcessDone) {
		gone := life.Gone(id)
		if why := EndReason(st.Machine); why != "" {
			gone.Cause = errors.New(why)
		}
		return nil, gone
	}
	if err != nil {
		return nil, fmt.Errorf("adopt sandbox %s: %w", id, err)
	}
	return inst, nil
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
	if err := r.free(ctx, id, st.Machine.Dir); err != nil {
		return fmt.Errorf("discard sandbox %s: %w", id, err)
	}
	return nil
}

// free frees an instance, and tells the monitor.
func (r *Runtime) free(ctx context.Context, id sandbox.ID, dir string) error {
	if err := free(ctx, r.set, id, dir); err != nil {
		return err
	}
	if err := r.cfg.Monitor.Ended(ctx, id); err != nil { // takes some memory, and no more
		r.cfg.Log.Warn("the end of a machine is not told", "sandbox", id, "err", err)
	}
	return nil
}

// free ends and removes everything that an instance of this id may have on the
// host, however much of it is there. dir may be empty when it is not known.
func free(ctx context.Context, set *life.Set, id sandbox.ID, dir string) error {
	if err := set.EndGroup(ctx, id); err != nil {
		return err
	}
	if dir == "" {
		return nil
	}
	var errs []error
	for _, name := range instanceFiles {
		errs = append(errs, disk.RemoveAll(filepath.Join(dir, name))) // what a monitor has made may be of any depth
	}
	return errors.Join(errs...)
}
