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

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/runtime/microvm/qemu"
)

// The runtimes that --runtime takes.
const (
	runtimeAuto   = "auto"
	runtimeGVisor = "gvisor"
	runtimeQEMU   = "qemu"
)

var runtimeNames = []string{runtimeAuto, runtimeGVisor, runtimeQEMU}

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

// prepareAgentDir makes the host agent's directory ready for the runtime: virtual
// machines want their disks on a file system that clones files at once. It comes
// before anything is opened there, the agent's lock included.
func (o *upOptions) prepareAgentDir(ctx context.Context, dir dataDir, log *slog.Logger) error {
	if err := os.MkdirAll(dir.agent(), 0o700); err != nil {
		return fmt.Errorf("make agent directory: %w", err)
	}
	if !o.virtualMachines() {
		return nil
	}
	reflinks, err := disk.HoldsReflinks(dir.agent())
	if err != nil || reflinks {
		return err
	}
	if err := dir.refuseHidden(); err != nil {
		return err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir.agent(), &st); err != nil {
		return err
	}
	log.Info("the data directory's file system cannot clone files; virtual machines get one in a file", "file", dir.disks())
	free := int64(st.Bavail) * st.Bsize
	if err := disk.Mount(ctx, dir.agent(), dir.disks(), max(free/10*9, 1<<30)); err != nil {
		return fmt.Errorf("%w (or choose a data directory on XFS or Btrfs with --data)", err)
	}
	return os.Chmod(dir.agent(), 0o700)
}

// virtualMachines reports whether the runtime that was chosen makes them.
func (o *upOptions) virtualMachines() bool { return o.Runtime == runtimeQEMU }

// refuseHidden refuses to mount over sandboxes of another runtime.
func (d dataDir) refuseHidden() error {
	for _, name := range []string{"sandboxes", "images"} {
		entries, err := os.ReadDir(filepath.Join(d.agent(), name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if len(entries) > 0 {
			return fmt.Errorf("%s has sandboxes or snapshots of gVisor, and is on a file system where virtual machines cannot be beside them: start with --runtime gvisor, or with another --data", d)
		}
	}
	return nil
}

// openRuntime prepares the runtime that was chosen. One that cannot run here says why,
// and what would.
func openRuntime(ctx context.Context, dir dataDir, opts upOptions, log *slog.Logger) (engine, error) {
	switch opts.Runtime {
	case runtimeQEMU:
		return openQEMU(ctx, dir, log)
	default:
		return openGVisor(dir, log)
	}
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

func openQEMU(ctx context.Context, dir dataDir, log *slog.Logger) (engine, error) {
	k, err := kernel.Load(dir.kernels())
	if err != nil {
		return nil, fmt.Errorf("%w --data %s", err, dir)
	}
	accelerator, why, err := qemu.Choose(ctx, k, filepath.Join(string(dir), "kvm.json"))
	if err != nil {
		return nil, err
	}
	if accelerator == qemu.TCG {
		log.Warn("virtual machines are emulated in software, and are slow", "why", why)
	}
	monitor, err := qemu.New(ctx, qemu.Config{Accelerator: accelerator})
	if err != nil {
		return nil, err
	}
	return microvm.New(microvm.Config{
		Monitor: monitor, Kernel: k, Disks: filepath.Join(dir.agent(), "disks"), Tag: dir.tag(), Log: log,
	})
}
