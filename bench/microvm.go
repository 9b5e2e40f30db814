package bench

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/network"
)

// machineForks is how many machines are forked at once.
const machineForks = 4

// What is measured of virtual machines, in milliseconds.
const (
	vmBoot        = "create to first output, booted"
	vmPause       = "pause"
	vmResume      = "resume to first output"
	vmFork        = "fork of 4 to first output of all"
	vmSlot        = "network slot with TAP, without pool"
	floorVMBoot   = "floor: bare QEMU, start to first output"
	floorVMPause  = "floor: bare QEMU, migrate to a file"
	floorVMResume = "floor: bare QEMU, incoming to first output"
	floorVMFork   = "floor: 4 bare QEMU, incoming at once to first output of all"
)

// MicroVM measures the life of virtual machines on a platform whose runtime is QEMU,
// beside QEMU started by hand with the same kernel, disk, link and guest agent, that
// writes and reads its images itself. One sample takes seconds where the processor is
// emulated.
func MicroVM(ctx context.Context, p Platform, n int) (_ Report, err error) {
	r := Report{Bench: "microvm", Host: thisHost("qemu")}
	f, err := newMachineFloor(ctx, p.DataDir)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, f.closeAll(context.WithoutCancel(ctx))) }()
	m := machines{lifecycle: lifecycle{platform: p, got: make(map[string]*samples), keep: true}, bare: f}
	if err := m.slots(max(n, 30)); err != nil { // while nothing else goes on
		return r, err
	}
	for i := range n {
		for _, step := range []func(context.Context) error{m.bareLife, m.life} {
			if err := step(ctx); err != nil {
				return r, err
			}
		}
		progress("microvm: %d of %d", i+1, n)
	}
	get := func(name string) samples {
		if s := m.got[name]; s != nil {
			return *s
		}
		return nil
	}
	result := func(name string) Result { return get(name).result(name, "ms") }
	slot := result(vmSlot)
	r.Results = []Result{
		result(vmBoot).against(get(floorVMBoot), 1.2).noted("from the template's disk; then /bin/echo"),
		result(vmPause).against(get(floorVMPause), 1.2).noted("until it is on disk, synced; floor: synced too"),
		result(vmResume).against(get(floorVMResume), 1.2).noted("then /bin/echo"),
		result(vmFork).against(get(floorVMFork), 1.2).noted("from one that runs; on both sides the image that they are made from is written first"),
		slot.want("p50 ≤ 5", slot.P50 <= 5),
	}
	for _, name := range []string{floorVMBoot, floorVMPause, floorVMResume, floorVMFork} {
		r.Results = append(r.Results, result(name))
	}
	return r, nil
}

// machines is a run of the benchmark.
type machines struct {
	lifecycle
	bare *machineFloor
}

// bareLife boots a bare machine, pauses it, and resumes it, once and four times at
// once.
func (m *machines) bareLife(ctx context.Context) error {
	b, boot, err := m.bare.start(ctx, m.bare.template, "")
	if err != nil {
		return fmt.Errorf("boot bare qemu: %w", err)
	}
	output, err := b.firstOutput(ctx, "/bin/echo", "hello")
	image := filepath.Join(m.bare.dir, "image")
	var pause time.Duration
	if err == nil {
		pause, err = b.pause(ctx, image)
	}
	if err = errors.Join(err, b.stop(ctx)); err != nil {
		return fmt.Errorf("pause bare qemu: %w", err)
	}
	m.add(floorVMBoot, boot+output)
	m.add(floorVMPause, pause)
	for name, count := range map[string]int{floorVMResume: 1, floorVMFork: machineForks} {
		var g errgroup.Group
		made := make([]*bareMachine, count)
		begin := time.Now()
		for i := range made {
			g.Go(func() (err error) {
				if made[i], _, err = m.bare.start(ctx, image+".disk", image); err == nil {
					_, err = made[i].firstOutput(ctx, "/bin/echo", "hello")
				}
				return err
			})
		}
		err := g.Wait()
		took := time.Since(begin)
		if name == floorVMFork {
			took += pause // from a machine that runs to four: the image is written first
		}
		m.add(name, took)
		for _, b := range made {
			if b != nil {
				err = errors.Join(err, b.stop(ctx))
			}
		}
		if err != nil {
			return fmt.Errorf("resume bare qemu: %w", err)
		}
	}
	return nil
}

// life is the same on the platform.
func (m *machines) life(ctx context.Context) (err error) {
	s, err := m.create(ctx, vmBoot, startBoot)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, m.kill(ctx, s)) }()
	c := m.platform.Client
	if err := m.time(vmPause, func() error { return c.Pause(ctx, s.ID(), true) }); err != nil {
		return err
	}
	err = m.time(vmResume, func() error {
		info, _, err := c.Connect(ctx, s.ID(), client.ConnectRequest{Timeout: time.Hour})
		if err != nil {
			return err
		}
		return firstOutput(ctx, c.Sandbox(info), "/bin/echo", "hello")
	})
	if err != nil {
		return err
	}
	var made []client.Fork
	err = m.time(vmFork, func() (err error) {
		if made, err = c.Fork(ctx, s.ID(), machineForks, time.Hour); err != nil {
			return err
		}
		var g errgroup.Group
		for _, one := range made {
			g.Go(func() error {
				if one.Err != nil {
					return one.Err
				}
				return firstOutput(ctx, c.Sandbox(one.Sandbox), "/bin/echo", "hello")
			})
		}
		return g.Wait()
	})
	for _, one := range made {
		if one.Err == nil {
			err = errors.Join(err, c.Kill(context.WithoutCancel(ctx), one.Sandbox.SandboxID))
		}
	}
	return err
}

// slots measures how long a slot takes that was not prepared ahead.
func (m *machines) slots(n int) error {
	for range n {
		took, err := network.TimeSlot(machineFloorTag)
		if err != nil {
			return fmt.Errorf("make network slot: %w", err)
		}
		m.add(vmSlot, took)
	}
	return nil
}
