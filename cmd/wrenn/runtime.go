package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/agent"
	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/kvm"
	"github.com/wrenn/wrenn/internal/memory/pager"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/firecracker"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/runtime/microvm/qemu"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// The runtimes that --runtime takes.
const (
	runtimeAuto        = "auto"
	runtimeGVisor      = "gvisor"
	runtimeFirecracker = "firecracker"
	runtimeQEMU        = "qemu"
)

var runtimeNames = []string{runtimeAuto, runtimeGVisor, runtimeFirecracker, runtimeQEMU}

// engine is the runtime of a platform, which ends with it.
type engine interface {
	runtime.Runtime
	Close() error
}

func (o *upOptions) parseRuntime() error {
	if !slices.Contains(runtimeNames, o.Runtime) {
		return usageErrorf("--runtime: there is no %q; want one of %s", o.Runtime, strings.Join(runtimeNames, ", "))
	}
	return nil
}

// choose settles which runtime is meant. Sandboxes that are here already go first: no
// other runtime can take them over. Without them and without a choice of the operator's
// it is Firecracker where that boots the kernel that is installed, else gVisor. One that
// was chosen and cannot run here says why, and what would.
func (o *upOptions) choose(ctx context.Context, dir dataDir, log *slog.Logger) (string, error) {
	here, live, err := agent.Runtimes(dir.agent())
	if err != nil {
		return "", err
	}
	chosen := o.Runtime
	if chosen == runtimeAuto && len(here) > 0 {
		chosen = append(live, here...)[0]
		log.Info("the data directory has sandboxes, and stays with their runtime", "runtime", chosen)
	}
	if chosen == runtimeAuto {
		if err := tryFirecracker(ctx, dir); err != nil {
			log.Info("sandboxes run in gVisor", "why", err)
			return runtimeGVisor, ctx.Err()
		}
		return runtimeFirecracker, nil
	}
	for _, other := range here {
		switch {
		case other == chosen:
		case slices.Contains(here, chosen) && !slices.Contains(live, other):
			// As in a directory of before one runtime kept others out.
			log.Warn("the data directory has paused sandboxes or snapshots of another runtime too: they stay, and only that can go on with them", "runtime", chosen, "other", other)
		default:
			return "", fmt.Errorf("%s has sandboxes or snapshots that only --runtime %s can go on with: start with that and remove them, or use another --data (`wrenn down` ends those that run, and keeps what is paused)", dir, other)
		}
	}
	if chosen == runtimeFirecracker {
		if err := tryFirecracker(ctx, dir); err != nil {
			return "", fmt.Errorf("%w; --runtime %s runs on any host, and --runtime %s makes virtual machines, slowly where KVM cannot boot Linux", err, runtimeGVisor, runtimeQEMU)
		}
	}
	return chosen, nil
}

func tryFirecracker(ctx context.Context, dir dataDir) error {
	monitor, err := newFirecracker(ctx, dir)
	if err != nil {
		return err
	}
	k, err := dir.kernel()
	if err != nil {
		return err
	}
	return monitor.Probe(ctx, k)
}

// jailerVariable names the jailer of Firecracker that is used: its path, or "none".
const jailerVariable = "WRENN_JAILER"

func newFirecracker(ctx context.Context, dir dataDir) (*firecracker.Monitor, error) {
	return firecracker.New(ctx, firecracker.Config{
		Data: string(dir), Pager: dir.pager, PagerSocket: dir.pagerSocket(), Jailer: os.Getenv(jailerVariable),
	})
}

// pager connects to the pager of this data directory, and starts it if need be.
func (d dataDir) pager(ctx context.Context) (*pager.Client, error) {
	if err := os.MkdirAll(filepath.Dir(d.pagerLog()), 0o755); err != nil {
		return nil, err
	}
	log, err := os.OpenFile(d.pagerLog(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	return pager.Start(ctx, d.pagerSocket(), []string{pager.Self, "pager", "--socket", d.pagerSocket()}, log)
}

// kernel is what virtual machines boot.
func (d dataDir) kernel() (kernel.Kernel, error) {
	k, err := kernel.Load(d.kernels())
	if err != nil {
		return k, fmt.Errorf("%w --data %s", err, d)
	}
	return k, nil
}

// makesMachines reports whether a runtime's sandboxes are virtual machines.
func makesMachines(name string) bool { return name == runtimeFirecracker || name == runtimeQEMU }

// mountDisks mounts the file system that virtual machines have got in this data
// directory, if they have: what is there is there for every runtime. It comes before
// anything is opened there, the agent's lock included.
func mountDisks(ctx context.Context, dir dataDir) error {
	if err := os.MkdirAll(dir.agent(), 0o700); err != nil {
		return fmt.Errorf("make agent directory: %w", err)
	}
	if _, err := os.Stat(dir.disks()); errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	err := mountAgentDir(ctx, dir, 0)
	if errors.Is(err, errSandboxesHere) {
		err = fmt.Errorf("there are sandboxes in %s, and a file system for virtual machines in %s, which has its own: each would hide the other's; move one of both to another place", dir.agent(), dir.disks())
	}
	return err
}

// errSandboxesHere says that sandboxes are where virtual machines' disks would be.
var errSandboxesHere = errors.New("sandboxes are there")

// mountAgentDir mounts the file system for virtual machines' disks, and makes it with that
// size if there is none. Sandboxes are never mounted over.
func mountAgentDir(ctx context.Context, dir dataDir, size int64) error {
	if mounted, err := disk.Mounted(dir.agent(), dir.disks()); err != nil || mounted {
		return err
	}
	here, _, err := agent.Runtimes(dir.agent())
	if err != nil {
		return err
	}
	if len(here) > 0 {
		return errSandboxesHere
	}
	return disk.Mount(ctx, dir.agent(), dir.disks(), size)
}

// leastDisks is the room that virtual machines want for their disks, in bytes.
const leastDisks = 2 << 30

// prepareAgentDir makes the host agent's directory ready for the runtime: virtual
// machines want their disks on a file system that clones files at once.
func prepareAgentDir(ctx context.Context, dir dataDir, runtime string, log *slog.Logger) error {
	if !makesMachines(runtime) {
		return nil
	}
	reflinks, err := disk.HoldsReflinks(dir.agent())
	if errors.Is(err, sandbox.ErrExhausted) {
		// Whoever wants to make room needs a platform that runs. Without reflinks disks
		// are copied.
		log.Warn("the disk is full: delete snapshots and sandboxes that are not needed", "err", err)
		return nil
	}
	if err != nil || reflinks {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir.agent(), &st); err != nil {
		return err
	}
	log.Info("the data directory's file system cannot clone files; virtual machines get one in a file", "file", dir.disks())
	free := int64(st.Bavail) * st.Bsize
	if free < leastDisks {
		return fmt.Errorf("virtual machines want %d MiB at least for their disks, and %s has %d: choose another data directory with --data", leastDisks>>20, dir, free>>20)
	}
	err = mountAgentDir(ctx, dir, free/10*9)
	if errors.Is(err, errSandboxesHere) {
		log.Warn("sandboxes are in the data directory already, so that virtual machines' disks are copied: remove those sandboxes to have a file system made that clones them, or move to a data directory on XFS or Btrfs")
		return nil
	}
	if err != nil {
		return fmt.Errorf("%w (or choose a data directory on XFS or Btrfs with --data)", err)
	}
	return os.Chmod(dir.agent(), 0o700)
}

// openRuntime prepares the runtime of that name.
func openRuntime(ctx context.Context, dir dataDir, name string, log *slog.Logger) (engine, error) {
	if !makesMachines(name) {
		return openGVisor(dir, log)
	}
	k, err := dir.kernel()
	if err != nil {
		return nil, err
	}
	var monitor microvm.Monitor
	if name == runtimeFirecracker {
		monitor, err = newFirecracker(ctx, dir)
	} else {
		monitor, err = newQEMU(ctx, dir, k, log)
	}
	if err != nil {
		return nil, err
	}
	return microvm.New(microvm.Config{
		Monitor: monitor, Kernel: k, Disks: filepath.Join(dir.agent(), "disks"), Tag: dir.tag(), Log: log,
	})
}

// keepOfRuntime is what the runtime needs of the agent's bin directory.
func keepOfRuntime(rt engine) []string {
	if g, ok := rt.(*gvisor.Runtime); ok {
		return []string{g.Binary()}
	}
	return nil
}

func openGVisor(dir dataDir, log *slog.Logger) (engine, error) {
	runsc, err := gvisor.InstallBinary(filepath.Join(dir.agent(), "bin"))
	if err != nil {
		return nil, err
	}
	return gvisor.New(gvisor.Config{Binary: runsc, Root: dir.runsc(), Tag: dir.tag(), Log: log})
}

func newQEMU(ctx context.Context, dir dataDir, k kernel.Kernel, log *slog.Logger) (*qemu.Monitor, error) {
	accelerator, why, err := qemu.Choose(ctx, k, filepath.Join(string(dir), kvm.QEMUVerdict))
	if err != nil {
		return nil, err
	}
	if accelerator == qemu.TCG {
		log.Warn("virtual machines are emulated in software, and are slow", "why", why)
	}
	return qemu.New(ctx, qemu.Config{Accelerator: accelerator})
}
