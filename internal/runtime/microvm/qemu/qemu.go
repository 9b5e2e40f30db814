// Package qemu drives QEMU as the monitor of one virtual machine: with KVM where that
// runs Linux, else by emulating the processor in software, which works anywhere and is
// slow.
//
// An image of a machine is the state of its devices, written by QEMU as a migration
// stream, and its memory as package memory stores it, which is read from outside:
// the pages that the machine has written to are those of QEMU's own in a private
// mapping. A machine that is loaded maps a file of memory, sealed against writes,
// privately, so that those made of one image share what none of them has changed.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/jail"
)

// Accelerator is what runs the guest's instructions.
type Accelerator string

// The accelerators.
const (
	KVM Accelerator = "kvm"
	TCG Accelerator = "tcg" // software emulation
)

// program is QEMU's, as Debian names it.
const program = "qemu-system-x86_64"

// Config is how QEMU is used.
type Config struct {
	Accelerator Accelerator
}

// Monitor drives QEMU. It implements microvm.Monitor.
type Monitor struct {
	binary  string
	accel   Accelerator
	version string

	memories memories
}

var _ microvm.Monitor = (*Monitor)(nil)

// New finds QEMU on this host.
func New(ctx context.Context, cfg Config) (*Monitor, error) {
	binary, err := exec.LookPath(program)
	if err != nil {
		return nil, fmt.Errorf("qemu is not installed: install the package qemu-system-x86 (%w)", err)
	}
	if binary, err = filepath.EvalSymlinks(binary); err != nil {
		return nil, err
	}
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("ask %s for its version: %w", binary, err)
	}
	words := strings.Fields(string(out)) // QEMU emulator version 7.2.22 (Debian …)
	if len(words) < 4 {
		return nil, fmt.Errorf("ask %s for its version: it says %q", binary, out)
	}
	return &Monitor{binary: binary, accel: cfg.Accelerator, version: words[3] + "-" + string(cfg.Accelerator), memories: memories{files: map[[32]byte]*shared{}}}, nil
}

// Name implements microvm.Monitor.
func (*Monitor) Name() string { return "qemu" }

// Version implements microvm.Monitor.
func (q *Monitor) Version() string { return q.version }

// Paths in the jail.
const (
	runDir     = "/run/wrenn"
	kernelPath = "/boot/kernel"
	initrdPath = "/boot/initramfs"
	rootPath   = "/disk/root"
	agentPath  = "/disk/agent"
	socketName = "qmp.sock"
	stateName  = "devices" // in an image
)

// mounts is what of the host QEMU sees.
func (q *Monitor) mounts(m microvm.Machine) []jail.Mount {
	return append([]jail.Mount{
		{From: m.Run(), To: runDir, Writable: true},
		{From: m.Disk(), To: rootPath, Writable: true},
		{From: m.Agent, To: agentPath},
		{From: m.Kernel, To: kernelPath},
		{From: m.Initramfs, To: initrdPath},
	}, jail.System...)
}

// start starts QEMU. memory is the file that the machine's memory is a private
// mapping of; nil: it is empty. state is what the devices are loaded from, or nil.
func (q *Monitor) start(ctx context.Context, m microvm.Machine, memory, state *os.File) (id process.ID, err error) {
	listener, err := listen(m)
	if err != nil {
		return id, err
	}
	defer listener.Close()
	out, err := microvm.OpenConsole(m)
	if err != nil {
		return id, err
	}
	defer out.Close()
	files := []*os.File{listener}
	file := func(f *os.File) int {
		files = append(files, f)
		return 2 + len(files)
	}
	memoryFD, stateFD := -1, -1
	if memory != nil {
		memoryFD = file(memory)
	}
	if state != nil {
		stateFD = file(state)
	}
	var tap *os.File
	defer func() {
		if tap != nil {
			tap.Close()
		}
	}()
	info, err := os.Stat(m.Disk())
	if err != nil {
		return id, err
	}
	c := jail.Config{
		Root: m.Jail(), Mounts: q.mounts(m), Program: q.binary, Dir: runDir, UID: m.UID, NetNS: m.NetNS,
		Cgroups: m.Cgroups, Group: m.Group, Stdout: out, Proc: true, MaxFile: max(info.Size(), maxState),
		Inside: func(c *jail.Config) error {
			var err error
			if tap, err = openTAP(m.TAP); err != nil {
				return err
			}
			tapFD := file(tap)
			c.Files, c.Args = files, q.args(m, tapFD, memoryFD, stateFD)
			return nil
		},
	}
	if q.accel == KVM {
		c.Devices = []jail.Device{{Path: "/dev/kvm"}}
	}
	return jail.Start(ctx, c)
}

// machineArgs are those of every machine: what kind it is and what runs it.
func (q *Monitor) machineArgs(cpus int) []string {
	accel, cpu := "kvm", "host"
	if q.accel == TCG {
		// What is translated takes this much memory, instead of up to 1 GiB.
		accel, cpu = "tcg,tb-size=64", "max"
	}
	return []string{
		"-name", "wrenn", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,usb=off,vmport=off,graphics=off,suppress-vmdesc=on",
		"-accel", accel, "-cpu", cpu, "-smp", fmt.Sprint(cpus),
	}
}

// toGuest has errors of a disk reported to the guest. On its own QEMU stops the machine
// when the host's disk is full, until somebody tells it to go on.
const toGuest = "werror=report,rerror=report"

// args are QEMU's arguments. Descriptor 3 is the socket it is controlled at.
func (q *Monitor) args(m microvm.Machine, tapFD, memoryFD, stateFD int) []string {
	ram := fmt.Sprintf("memory-backend-ram,id=ram,size=%dM", m.MemoryMiB)
	if memoryFD >= 0 {
		ram = fmt.Sprintf("memory-backend-file,id=ram,size=%dM,share=off,mem-path=/proc/self/fd/%d", m.MemoryMiB, memoryFD)
	}
	args := append(q.machineArgs(m.CPUs),
		"-machine", "memory-backend=ram", "-m", fmt.Sprintf("%dM", m.MemoryMiB), "-object", ram,
		"-kernel", kernelPath, "-initrd", initrdPath, "-append", m.CmdLine,
		"-blockdev", "driver=raw,node-name=root,discard=unmap,file.driver=file,file.filename="+rootPath+",file.discard=unmap,file.locking=off",
		"-device", "virtio-blk-pci,drive=root,bootindex=-1,"+toGuest,
		"-blockdev", "driver=raw,node-name=agent,read-only=on,file.driver=file,file.filename="+agentPath+",file.locking=off",
		"-device", "virtio-blk-pci,drive=agent,bootindex=-1,"+toGuest,
		"-netdev", fmt.Sprintf("tap,id=net,fd=%d,vhost=off", tapFD),
		"-device", "virtio-net-pci,netdev=net,mac="+m.MAC+",romfile=",
		"-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng",
		"-device", "vmgenid,guid=auto", // another one at each load: kernels that know it renew their random numbers
		"-chardev", "pipe,id=console,path="+runDir+"/"+microvm.ConsoleName, "-serial", "chardev:console",
		"-chardev", "socket,id=qmp,fd=3,server=on,wait=off", "-mon", "chardev=qmp,mode=control",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
	)
	if stateFD >= 0 {
		// The stream has devices and nothing that says what machine they are of.
		args = append(args, "-S", "-global", "migration.send-configuration=off", "-incoming", "defer")
	}
	return args
}

// Boot implements microvm.Monitor.
func (q *Monitor) Boot(ctx context.Context, m microvm.Machine) (process.ID, error) {
	id, err := q.start(ctx, m, nil, nil)
	if err != nil {
		return id, err
	}
	c, err := dial(ctx, m.Run(), socketName)
	if err != nil {
		return id, q.explain(m, err)
	}
	c.close()
	return id, nil
}

// Identify implements microvm.Monitor: QEMU answers no questions of the guest's.
func (*Monitor) Identify(context.Context, microvm.Machine, string, string) error { return nil }

// Pause implements microvm.Monitor.
func (q *Monitor) Pause(ctx context.Context, m microvm.Machine) error {
	return q.command(ctx, m, "stop")
}

// Resume implements microvm.Monitor.
func (q *Monitor) Resume(ctx context.Context, m microvm.Machine) error {
	return q.command(ctx, m, "cont")
}

func (q *Monitor) command(ctx context.Context, m microvm.Machine, name string) error {
	c, err := dial(ctx, m.Run(), socketName)
	if err != nil {
		return err
	}
	defer c.close()
	return c.do(ctx, name, nil, nil)
}

// explain adds to the error what QEMU said before it ended.
func (q *Monitor) explain(m microvm.Machine, err error) error {
	if said := microvm.LastWords(m); said != "" {
		return errors.Join(errors.New(said), err)
	}
	return err
}
