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
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/cgroup"
	"github.com/wrenn/wrenn/internal/runtime"
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
	cfg     Config
	cgroups cgroup.Trees
	disks   *disks

	ctx  context.Context // ends with Close
	stop context.CancelFunc
	work sync.WaitGroup // watchers and clean-ups

	compacting chan struct{} // holds a token while memory is compacted

	mu      sync.Mutex
	claimed map[sandbox.ID]bool // ids being created just now
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
	cgroups, err := cgroup.Find()
	if err != nil {
		return nil, fmt.Errorf("new %s runtime: %w", cfg.Monitor.Name(), err)
	}
	ctx, stop := context.WithCancel(context.Background())
	r := &Runtime{cfg: cfg, cgroups: cgroups, disks: disks, ctx: ctx, stop: stop, compacting: make(chan struct{}, 1), claimed: map[sandbox.ID]bool{}}
	r.work.Go(func() { cfg.Monitor.Watch(ctx, cfg.Log) })
	return r, nil
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
	r.stop()
	r.work.Wait()
	if len(r.cgroups.Children(parentGroup(r.cfg.Tag))) > 0 {
		return nil
	}
	return removeTraces(r.cgroups, r.cfg.Tag)
}

// RemoveAll ends every machine of the platform with this tag. Their directories are
// their makers' to remove.
func RemoveAll(tag string) error {
	cgroups, err := cgroup.Find()
	if err != nil {
		return fmt.Errorf("remove all sandboxes: %w", err)
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, id := range cgroups.Children(parentGroup(tag)) {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(context.Background(), teardownTime)
			defer cancel()
			return free(ctx, cgroups, tag, sandbox.ID(id), "")
		})
	}
	return errors.Join(g.Wait(), removeTraces(cgroups, tag))
}

func removeTraces(cgroups cgroup.Trees, tag string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return cgroups.Remove(ctx, parentGroup(tag))
}

func parentGroup(tag string) string          { return "/wrenn-" + tag }
func group(tag string, id sandbox.ID) string { return filepath.Join(parentGroup(tag), string(id)) }

// Adopt implements runtime.Runtime.
func (r *Runtime) Adopt(_ context.Context, id sandbox.ID, raw json.RawMessage) (runtime.Instance, error) {
	var st state
	if err := json.Unmarshal(raw, &st); err != nil {
		return nil, &sandbox.Error{Kind: sandbox.ErrInvalid, Message: fmt.Sprintf("the recorded state of sandbox %s is damaged", id), Cause: err}
	}
	inst, err := r.open(st)
	if errors.Is(err, os.ErrProcessDone) {
		gone := &sandbox.Error{Kind: sandbox.ErrNotFound, Message: fmt.Sprintf("sandbox %s is not running any more", id)}
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

// teardownTime bounds a clean-up: processes end in milliseconds, so this is
// only reached when the host is in deep trouble.
const teardownTime = 30 * time.Second

// free frees an instance, and tells the monitor.
func (r *Runtime) free(ctx context.Context, id sandbox.ID, dir string) error {
	if err := free(ctx, r.cgroups, r.cfg.Tag, id, dir); err != nil {
		return err
	}
	if err := r.cfg.Monitor.Ended(ctx, id); err != nil { // takes some memory, and no more
		r.cfg.Log.Warn("the end of a machine is not told", "sandbox", id, "err", err)
	}
	return nil
}

// free ends and removes everything that an instance of this id may have on the
// host, however much of it is there. dir may be empty when it is not known.
func free(ctx context.Context, cgroups cgroup.Trees, tag string, id sandbox.ID, dir string) error {
	if err := cgroups.Kill(ctx, group(tag, id)); err != nil {
		return err
	}
	if err := cgroups.Remove(ctx, group(tag, id)); err != nil {
		return err
	}
	if dir == "" {
		return nil
	}
	var errs []error
	for _, name := range instanceFiles {
		errs = append(errs, os.RemoveAll(filepath.Join(dir, name)))
	}
	return errors.Join(errs...)
}
