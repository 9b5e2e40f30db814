package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/disk"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// machineFloor makes virtual machines with nothing of the platform: QEMU as one
// would start it by hand, with the same kernel, guest agent, disk and link, and its
// own images.
type machineFloor struct {
	floor    // for its slots and its questions to the guest agent
	kernel   kernel.Kernel
	template string // disk image
	agent    string // disk image
	memory   int64  // MiB
	cpus     int
}

const machineFloorTag = "bbbc"

// newMachineFloor uses what the platform in dataDir uses.
func newMachineFloor(ctx context.Context, dataDir string) (*machineFloor, error) {
	f := &machineFloor{floor: floor{http: newFloorClient()}, memory: 512 + 46 + 512/64, cpus: 2}
	var err error
	if f.kernel, err = kernel.Load(filepath.Join(dataDir, "kernels")); err != nil {
		return nil, err
	}
	disks := filepath.Join(dataDir, "agent", "disks")
	if f.agent, err = newest(filepath.Join(disks, "agent-*.ext4")); err != nil {
		return nil, err
	}
	if f.template, err = newest(filepath.Join(disks, "[0-9a-f]*[0-9a-f].ext4")); err != nil {
		return nil, err
	}
	if f.dir, err = os.MkdirTemp(filepath.Join(dataDir, "agent"), "floor-"); err != nil {
		return nil, fmt.Errorf("make floor directory: %w", err)
	}
	f.slots, err = network.Open(ctx, network.Config{
		Tag: machineFloorTag, TAP: true, CIDR: netip.MustParsePrefix("10.252.0.0/16"), Ready: machineForks, Log: slog.New(slog.DiscardHandler),
	}, nil)
	if err != nil {
		os.RemoveAll(f.dir)
		return nil, fmt.Errorf("prepare floor's network: %w", err)
	}
	return f, nil
}

func (f *machineFloor) closeAll(ctx context.Context) error {
	return errors.Join(f.slots.Close(ctx), os.RemoveAll(f.dir))
}

// bareMachine is one QEMU process.
type bareMachine struct {
	floor *machineFloor
	dir   string
	slot  *network.Slot
	cmd   *exec.Cmd
	bare  // for firstOutput
}

// start starts a machine on a clone of the disk, from an image unless that is empty,
// and returns it with the time until the guest agent has answered.
func (f *machineFloor) start(ctx context.Context, diskImage, state string) (_ *bareMachine, took time.Duration, err error) {
	m := &bareMachine{floor: f}
	if m.dir, err = os.MkdirTemp(f.dir, "m-"); err != nil {
		return nil, 0, err
	}
	if m.slot, err = f.slots.Acquire(ctx, network.Policy{AllowInternet: true}); err != nil {
		return nil, 0, errors.Join(err, os.RemoveAll(m.dir))
	}
	m.bare = bare{floor: &f.floor, id: string(sandbox.NewID()), slot: m.slot}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.stop(ctx))
		}
	}()
	begin := time.Now()
	if err := disk.Clone(ctx, diskImage, m.disk()); err != nil {
		return nil, 0, err
	}
	if state == "" {
		if err := os.Truncate(m.disk(), 11<<30); err != nil {
			return nil, 0, err
		}
	}
	if err := m.launch(state); err != nil {
		return nil, 0, err
	}
	if state != "" {
		// It comes back as it was, stopped.
		if err := m.qmp(ctx, "completed"); err != nil {
			return nil, 0, err
		}
		if err := m.qmp(ctx, "", "cont"); err != nil {
			return nil, 0, err
		}
	}
	if err := f.waitHealthy(ctx, m.slot.HostAddr); err != nil {
		return nil, 0, err
	}
	return m, time.Since(begin), nil
}

func (m *bareMachine) disk() string   { return filepath.Join(m.dir, "disk") }
func (m *bareMachine) socket() string { return filepath.Join(m.dir, "qmp") }

// launch starts QEMU in the slot's network namespace.
func (m *bareMachine) launch(state string) error {
	f := m.floor
	line := ""
	for _, word := range kernel.Args() {
		line += word + " "
	}
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35,usb=off,vmport=off", "-accel", "tcg", "-cpu", "max",
		"-smp", fmt.Sprint(f.cpus), "-m", fmt.Sprintf("%dM", f.memory),
		"-kernel", f.kernel.Vmlinux, "-initrd", f.kernel.Initramfs, "-append", line + "-- -vm",
		"-drive", "if=none,id=root,format=raw,file=" + m.disk(), "-device", "virtio-blk-pci,drive=root",
		"-drive", "if=none,id=agent,format=raw,readonly=on,file=" + f.agent, "-device", "virtio-blk-pci,drive=agent",
		"-netdev", "tap,id=net,ifname=" + m.slot.TAP + ",script=no,downscript=no,vhost=off",
		"-device", "virtio-net-pci,netdev=net,romfile=,mac=" + network.GuestMAC.String(),
		"-device", "virtio-rng-pci", "-serial", "null", "-qmp", "unix:" + m.socket() + ",server=on,wait=off",
	}
	if state != "" {
		args = append(args, "-incoming", "exec:cat "+state)
	}
	m.cmd = exec.Command("qemu-system-x86_64", args...)
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and not unlocked: the thread ends, unless it is the first
		ns, err := os.Open(m.slot.NetNS)
		if err == nil {
			err = unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET)
			ns.Close()
		}
		if err == nil {
			err = m.cmd.Start()
		}
		done <- err
	}()
	return <-done
}

// qmp runs commands of QEMU's control socket, once its state is wanted unless that is
// empty.
func (m *bareMachine) qmp(ctx context.Context, status string, commands ...string) error {
	conn, err := m.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	in := json.NewDecoder(conn)
	do := func(command string) (answer struct {
		Return json.RawMessage
		Error  json.RawMessage
	}, err error) {
		if _, err = fmt.Fprintln(conn, command); err != nil {
			return answer, err
		}
		for answer.Return == nil && answer.Error == nil {
			if err = in.Decode(&answer); err != nil {
				return answer, err
			}
		}
		if answer.Error != nil {
			err = fmt.Errorf("qemu: %s: %s", command, answer.Error)
		}
		return answer, err
	}
	var greeting json.RawMessage
	if err := in.Decode(&greeting); err != nil {
		return err
	}
	for _, c := range append([]string{"qmp_capabilities"}, commands...) {
		if c[0] != '{' {
			c = `{"execute":"` + c + `"}`
		}
		if _, err := do(c); err != nil {
			return err
		}
	}
	for status != "" {
		answer, err := do(`{"execute":"query-migrate"}`)
		if err != nil {
			return err
		}
		var state struct{ Status string }
		if err := json.Unmarshal(answer.Return, &state); err != nil {
			return err
		}
		switch state.Status {
		case status:
			return nil
		case "failed":
			return errors.New("qemu could not write its image")
		}
		<-time.After(time.Millisecond) // there is no event that tells without more ado
	}
	return nil
}

// dial waits until QEMU has its socket.
func (m *bareMachine) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", m.socket())
		if err == nil {
			return conn, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("bare qemu has no control socket: %w", err)
		case <-time.After(time.Millisecond):
		}
	}
}

// pause stops the machine and has QEMU write its image to a file, as it does by
// itself, with a copy of the disk beside. It ends with that.
func (m *bareMachine) pause(ctx context.Context, to string) (time.Duration, error) {
	begin := time.Now()
	err := m.qmp(ctx, "completed", "stop",
		`{"execute":"migrate-set-parameters","arguments":{"max-bandwidth":100000000000}}`,
		`{"execute":"migrate","arguments":{"uri":"exec:cat > `+to+`"}}`)
	if err == nil {
		err = disk.Clone(ctx, m.disk(), to+".disk")
	}
	if err == nil {
		err = syncFile(to)
	}
	return time.Since(begin), err
}

func syncFile(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (m *bareMachine) stop(ctx context.Context) error {
	if m.cmd != nil && m.cmd.Process != nil {
		_ = m.cmd.Process.Kill() // it may have ended already
		_ = m.cmd.Wait()
	}
	return errors.Join(os.RemoveAll(m.dir), m.floor.slots.Release(context.WithoutCancel(ctx), m.slot))
}
