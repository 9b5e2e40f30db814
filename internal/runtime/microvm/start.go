package microvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"github.com/wrenn/wrenn/internal/cgroup"
	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/life"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Create implements runtime.Runtime.
func (r *Runtime) Create(ctx context.Context, cfg runtime.Config) (runtime.Instance, error) {
	inst, err := r.start(ctx, cfg, nil)
	if err != nil {
		return nil, fmt.Errorf("create sandbox %s: %w", cfg.ID, err)
	}
	return inst, nil
}

// Restore implements runtime.Runtime.
func (r *Runtime) Restore(ctx context.Context, cfg runtime.Config, image runtime.Image) (runtime.Instance, error) {
	if !filepath.IsAbs(image.Dir) {
		return nil, fmt.Errorf("path %q is not absolute", image.Dir)
	}
	inst, err := r.start(ctx, cfg, &image)
	if err != nil {
		return nil, fmt.Errorf("restore sandbox %s: %w", cfg.ID, err)
	}
	return inst, nil
}

// start makes an instance, from an image unless that is nil. When it fails,
// nothing is left.
func (r *Runtime) start(ctx context.Context, cfg runtime.Config, image *runtime.Image) (*instance, error) {
	if err := check(cfg); err != nil {
		return nil, err
	}
	if err := r.set.Claim(cfg.ID); err != nil {
		return nil, err
	}
	defer r.set.Release(cfg.ID)
	inst, err := r.launch(ctx, cfg, image)
	if err != nil {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), life.FreeTime)
		defer cancel()
		if ferr := r.free(cleanup, cfg.ID, cfg.Dir); ferr != nil {
			r.cfg.Log.Error("failed start left something", "sandbox", cfg.ID, "err", ferr)
		}
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		return nil, err
	}
	return inst, nil
}

// check refuses what a machine would be made of and not run.
func check(cfg runtime.Config) error {
	if err := cfg.Check(); err != nil {
		return err
	}
	if cfg.Slot == nil || cfg.Slot.TAP == "" {
		return sandbox.Errorf(sandbox.ErrInvalid, "a virtual machine needs a network slot with a TAP")
	}
	if info, err := os.Stat(cfg.Dir); err != nil {
		return fmt.Errorf("open the instance's directory: %w", err)
	} else if !info.IsDir() {
		return fmt.Errorf("open the instance's directory: %s is no directory", cfg.Dir)
	}
	return checkProgram(cfg.GuestInit)
}

// checkProgram refuses a guest agent that no kernel would execute: the guest's finds
// that out only after it has booted.
func checkProgram(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open guest agent: %w", err)
	}
	defer f.Close()
	magic := make([]byte, 4)
	if _, err := f.Read(magic); err != nil || !bytes.Equal(magic, []byte("\x7fELF")) {
		return fmt.Errorf("open guest agent: %s is no program", path)
	}
	return nil
}

// launch makes what the machine consists of and starts its monitor.
func (r *Runtime) launch(ctx context.Context, cfg runtime.Config, image *runtime.Image) (_ *instance, err error) {
	m, err := r.machine(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err == nil {
			return
		}
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), life.FreeTime)
		defer cancel()
		if kerr := m.PID.End(cleanup); kerr != nil {
			r.cfg.Log.Error("failed start left its monitor", "sandbox", cfg.ID, "err", kerr)
		}
	}()
	var of manifest
	if image != nil {
		if of, err = r.readImage(*image, m); err != nil {
			return nil, err
		}
	}
	if err := r.prepare(ctx, cfg, m, image); err != nil {
		return nil, err
	}
	st := state{Resources: cfg.Resources}
	if image != nil && image.Kind == runtime.ImageMemory {
		m.CmdLine = of.CmdLine // the guest has read it, and the monitor lays it out as it was
		m.PID, err = r.cfg.Monitor.Load(ctx, m, image.Dir)
		if err == nil {
			err = cfg.Slot.WaitAttached()
		}
		if err == nil {
			err = r.cfg.Monitor.Resume(ctx, m)
		}
	} else {
		m.PID, err = r.cfg.Monitor.Boot(ctx, m)
	}
	if err != nil {
		if why := EndReason(m); why != "" {
			err = errors.Join(errors.New("the machine was ended: "+why), err)
		}
		return nil, err
	}
	st.Machine = m
	inst, err := r.open(st)
	if errors.Is(err, os.ErrProcessDone) {
		return nil, errors.New("the monitor ended at once")
	}
	if err != nil {
		return nil, err
	}
	if image != nil && image.Kind == runtime.ImageMemory {
		inst.compact()
	}
	return inst, nil
}

// machine says what the machine of an instance is.
func (r *Runtime) machine(ctx context.Context, cfg runtime.Config) (Machine, error) {
	agent, err := r.disks.agent(ctx, cfg.GuestInit)
	if err != nil {
		return Machine{}, err
	}
	uid, err := r.uid(cfg)
	if err != nil {
		return Machine{}, err
	}
	words := append(kernel.Args(),
		"wrenn.hostname="+cfg.Hostname,
		// The guest's kernel counts threads; the guest is shown no other limit.
		fmt.Sprintf("sysctl.kernel.threads-max=%d", cfg.Resources.PIDs),
	)
	return Machine{
		ID: cfg.ID, Dir: cfg.Dir, UID: uid, Group: r.set.Group(cfg.ID), Cgroups: r.set.Cgroups,
		NetNS: cfg.Slot.InnerNetNS, TAP: cfg.Slot.TAP, MAC: network.GuestMAC.String(),
		CPUs: cfg.Resources.CPUs, MemoryMiB: machineMemory(cfg.Resources.MemoryMiB),
		Kernel: r.cfg.Kernel.Vmlinux, Initramfs: r.cfg.Kernel.Initramfs, Agent: agent,
		CmdLine: commandLine(words, cfg.InitArgs),
	}, nil
}

// machineMemory is what a machine gets for its guest to have memoryMiB: the kernel's
// own code and the records it keeps of each page come out of it first.
func machineMemory(memoryMiB int64) int64 { return memoryMiB + kernelMiB + memoryMiB/64 }

const kernelMiB = 46

// Spare is what a monitor takes beyond its machine's memory, in MiB, for itself and for
// the records of that memory.
func Spare(m Machine) int64 { return 192 + m.MemoryMiB/16 }

// commandLine puts together what the kernel reads and what the guest agent is called
// with. The kernel knows of double quotes and of nothing to quote those with.
func commandLine(words, initArgs []string) string {
	var line bytes.Buffer
	for _, w := range words {
		fmt.Fprintf(&line, "%s ", w)
	}
	line.WriteString("-- -vm") // to be the first process of a machine
	for _, a := range initArgs {
		fmt.Fprintf(&line, " %s", a)
	}
	return line.String()
}

// uid is the user that the monitor of an instance is: no other machine's on this
// host, since no other has the slot, and none of the host's, which end below 2^16 or,
// where they are mapped into containers, below 2^30.
func (r *Runtime) uid(cfg runtime.Config) (uint32, error) {
	const slots = 1 << 14
	tag, err := strconv.ParseUint(r.cfg.Tag, 16, 16)
	if err != nil || cfg.Slot.Index < 0 || cfg.Slot.Index >= slots {
		return 0, fmt.Errorf("no user for slot %d of platform %q", cfg.Slot.Index, r.cfg.Tag)
	}
	return 1<<30 + uint32(tag)*slots + uint32(cfg.Slot.Index), nil
}

// prepare makes the instance's disk, directories and cgroup.
func (r *Runtime) prepare(ctx context.Context, cfg runtime.Config, m Machine, image *runtime.Image) error {
	from := ""
	if image != nil {
		from = filepath.Join(image.Dir, diskFile)
	} else {
		var err error
		if from, err = r.disks.template(ctx, cfg.RootFS); err != nil {
			return err
		}
	}
	if err := disk.Clone(ctx, from, m.Disk()); err != nil {
		return fmt.Errorf("clone disk: %w", err)
	}
	if image == nil {
		info, err := os.Stat(m.Disk())
		if err != nil {
			return err
		}
		// The guest makes its filesystem as large as the disk when it boots.
		if err := os.Truncate(m.Disk(), info.Size()+cfg.Resources.DiskMiB<<20); err != nil {
			return fmt.Errorf("enlarge disk: %w", err)
		}
	}
	for _, dir := range []string{m.Run(), m.Jail()} {
		if err := os.Mkdir(dir, 0o700); err != nil {
			return err
		}
	}
	for _, path := range []string{m.Disk(), m.Run()} {
		if err := os.Chown(path, int(m.UID), int(m.UID)); err != nil {
			return err
		}
	}
	if err := makeConsole(m); err != nil {
		return err
	}
	if err := cfg.Slot.GiveTAP(m.UID); err != nil {
		return err
	}
	loaded := image != nil && image.Kind == runtime.ImageMemory
	return r.set.Cgroups.Create(m.Group, cgroup.Limits{
		MemoryBytes: (m.MemoryMiB + r.cfg.Monitor.Spare(m, loaded)) << 20,
		CPUs:        float64(cfg.Resources.CPUs), PIDs: monitorTasks,
	})
}

// monitorTasks is how many threads a monitor may have: for processors, and QEMU's up to
// 64 for a disk, without which it aborts. The guest's processes are not among them.
const monitorTasks = 512
