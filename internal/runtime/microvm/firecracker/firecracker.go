package firecracker

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/memory/pager"
	"github.com/wrenn/wrenn/internal/process"
	"github.com/wrenn/wrenn/internal/runtime/microvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/jail"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// Config is how Firecracker is used.
type Config struct {
	Binary string // empty: firecracker of PATH; FIRECRACKER_BIN says which in tests
	Jailer string // empty: one beside Binary, or of PATH, or none; NoJailer: none
	Data   string // directory in which the verdict of Probe is kept
	// Pager connects to the pager that memory comes from, and starts it if need be;
	// nil: memory comes out of files. It listens at PagerSocket.
	Pager       func(context.Context) (*pager.Client, error)
	PagerSocket string
}

// Monitor drives Firecracker. It implements microvm.Monitor.
type Monitor struct {
	cfg     Config
	can     Capabilities
	pager   *pager.Keeper // nil: memory comes out of files
	version string
	jailer  string // path; empty: there is none
	without string // why
}

var _ microvm.Monitor = (*Monitor)(nil)

// New finds Firecracker on this host.
func New(ctx context.Context, cfg Config) (*Monitor, error) {
	if cfg.Binary == "" {
		path, err := exec.LookPath("firecracker")
		if err != nil {
			return nil, &sandbox.Error{Kind: sandbox.ErrUnavailable, Message: "Firecracker is not installed: put the program firecracker of a release into PATH", Cause: err}
		}
		cfg.Binary = path
	}
	v, err := ProgramVersion(ctx, cfg.Binary)
	if err != nil {
		return nil, err
	}
	can, err := CapabilitiesOf(v)
	if err != nil {
		return nil, err
	}
	jailer, without, err := findJailer(ctx, cfg, v)
	if err != nil {
		return nil, err
	}
	f := &Monitor{cfg: cfg, can: can, jailer: jailer, without: without, version: fmt.Sprintf("%s (%s, Linux %s)", v, processor(), hostRelease())}
	if cfg.Pager != nil {
		f.pager = pager.NewKeeper(cfg.PagerSocket, cfg.Pager)
	}
	return f, nil
}

// Name implements microvm.Monitor.
func (*Monitor) Name() string { return "firecracker" }

// Version implements microvm.Monitor: the state of the devices and of the processors
// depends on all that is in it.
func (f *Monitor) Version() string { return f.version }

// Paths in the jail. They are in the state of a machine, which finds its disks there
// when it is loaded.
const (
	runDir     = "/run/wrenn"
	kernelPath = "/boot/kernel"
	initrdPath = "/boot/initramfs"
	rootPath   = "/disk/root"
	agentPath  = "/disk/agent"
	socketName = "api.sock" // in runDir, as the next
	stateName  = "devices"  // also in an image
	memoryName = "memory.new"
	uffdName   = "uffd.sock"
)

const link = "eth0" // name of the machine's link in the API

// What a guest may send: with more it could keep the host from bringing its own
// packets in, those of terminals first.
var sendLimit = &RateLimiter{Bandwidth: &TokenBucket{Size: 200 << 20, Burst: 100 << 20, Refill: 1000}}

// commandLine adds to the words for the guest's kernel what the version needs.
func (f *Monitor) commandLine(words string) string {
	return strings.Join(append(f.can.KernelArgs(), words), " ")
}

// launch starts Firecracker and waits until it answers. Its own seccomp filters are
// on, as they are unless switched off.
func (f *Monitor) launch(ctx context.Context, m microvm.Machine) (id process.ID, c *Client, err error) {
	out, err := microvm.OpenConsole(m)
	if err != nil {
		return id, nil, err
	}
	defer out.Close()
	cfg, err := f.jailOf(m, out)
	if err != nil {
		return id, nil, err
	}
	id, err = jail.Start(ctx, cfg)
	if err != nil {
		return id, nil, f.explain(m, err)
	}
	c = newJailed(filepath.Join(m.Run(), socketName), m.UID)
	if err := answers(ctx, id, c); err != nil {
		c.Close()
		return id, nil, f.explain(m, err)
	}
	return id, c, nil
}

// answers waits until Firecracker takes calls. Nothing tells of that but a call.
func answers(ctx context.Context, id process.ID, c *Client) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	engine, err := id.Open()
	if err != nil {
		return fmt.Errorf("firecracker ended at once: %w", err)
	}
	defer engine.Close()
	again := time.NewTicker(time.Millisecond)
	defer again.Stop()
	for {
		_, err := c.Instance(ctx)
		switch {
		case err == nil:
			return nil
		case engine.Ended():
			return errors.New("firecracker ended at once")
		case !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ECONNREFUSED):
			return err
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for firecracker: %w", err)
		}
	}
}

// Boot implements microvm.Monitor.
func (f *Monitor) Boot(ctx context.Context, m microvm.Machine) (process.ID, error) {
	id, c, err := f.launch(ctx, m)
	if err != nil {
		return id, err
	}
	defer c.Close()
	if err := f.configure(ctx, c, m); err != nil {
		return id, f.explain(m, err)
	}
	return id, nil
}

func (f *Monitor) configure(ctx context.Context, c *Client, m microvm.Machine) error {
	for _, step := range []func() error{
		func() error {
			words := f.commandLine(askMMDS + " " + m.CmdLine)
			return c.SetBootSource(ctx, BootSource{Kernel: kernelPath, Initrd: initrdPath, Args: words})
		},
		// In this order they are /dev/vda and /dev/vdb. Neither is Firecracker's root
		// device, for which it would put words of its own into the command line.
		func() error { return c.SetDrive(ctx, Drive{ID: "root", Path: rootPath}) },
		func() error { return c.SetDrive(ctx, Drive{ID: "agent", Path: agentPath, ReadOnly: true}) },
		func() error {
			return c.SetNetwork(ctx, NetworkInterface{ID: link, TAP: m.TAP, MAC: m.MAC, TX: sendLimit})
		},
		func() error { return c.SetMachine(ctx, MachineConfig{CPUs: m.CPUs, MemoryMiB: m.MemoryMiB}) },
		func() error { return c.SetMMDSConfig(ctx, MMDSConfig{Version: "V2", Interfaces: []string{link}}) },
		func() error { return c.SetEntropy(ctx, Entropy{}) },
		func() error { return c.Start(ctx) },
	} {
		if err := step(); err != nil {
			return err
		}
	}
	return nil
}

// askMMDS tells the guest agent that it can ask for Metadata.
const askMMDS = "wrenn.mmds=1"

// Metadata is what the guest can ask for at the address of the MMDS, once somebody has
// the machine. A snapshot has none of it.
type Metadata struct {
	SandboxID  string `json:"instanceID"`
	TemplateID string `json:"envID"`
}

// Identify implements microvm.Monitor.
func (f *Monitor) Identify(ctx context.Context, m microvm.Machine, sandboxID, templateID string) error {
	return with(m, func(c *Client) error { return c.SetMMDS(ctx, Metadata{sandboxID, templateID}) })
}

// Pause implements microvm.Monitor.
func (f *Monitor) Pause(ctx context.Context, m microvm.Machine) error {
	return with(m, func(c *Client) error { return c.Pause(ctx) })
}

// Resume implements microvm.Monitor.
func (f *Monitor) Resume(ctx context.Context, m microvm.Machine) error {
	return with(m, func(c *Client) error { return c.Resume(ctx) })
}

func with(m microvm.Machine, do func(*Client) error) error {
	c := newJailed(filepath.Join(m.Run(), socketName), m.UID)
	defer c.Close()
	return do(c)
}

// explain adds to the error what Firecracker said before it ended.
func (f *Monitor) explain(m microvm.Machine, err error) error {
	if said := microvm.LastWords(m); said != "" {
		return errors.Join(err, errors.New(said))
	}
	return err
}
