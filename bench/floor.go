package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/guest"
	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// floor makes sandboxes with nothing of the platform: the bare commands of runsc
// on the same template and guest agent, in a network slot prepared ahead, as the
// platform's are.
type floor struct {
	runsc, envd, rootfs string
	dir                 string
	slots               *network.Pool
	http                *http.Client
}

const (
	floorTag   = "bbbb"
	floorSlots = forks // prepared ahead
)

// newFloor uses what the platform in dataDir uses.
func newFloor(ctx context.Context, dataDir string) (*floor, error) {
	f := &floor{http: newFloorClient()}
	var err error
	if f.runsc, err = newest(filepath.Join(dataDir, "agent/bin/runsc-*")); err != nil {
		return nil, err
	}
	if f.envd, err = newest(filepath.Join(dataDir, "agent/bin/envd-*")); err != nil {
		return nil, err
	}
	if f.rootfs, err = newest(filepath.Join(dataDir, "templates/*/rootfs")); err != nil {
		return nil, err
	}
	// runsc wants the root's path without links in it.
	if f.rootfs, err = filepath.EvalSymlinks(f.rootfs); err != nil {
		return nil, fmt.Errorf("find template: %w", err)
	}
	if f.dir, err = os.MkdirTemp("", "wrenn-floor"); err != nil {
		return nil, fmt.Errorf("make floor directory: %w", err)
	}
	f.slots, err = network.Open(ctx, network.Config{
		Tag: floorTag, CIDR: netip.MustParsePrefix("10.251.0.0/16"), Ready: floorSlots, Log: slog.New(slog.DiscardHandler),
	}, nil)
	if err != nil {
		os.RemoveAll(f.dir)
		return nil, fmt.Errorf("prepare floor's network: %w", err)
	}
	return f, nil
}

func newFloorClient() *http.Client {
	// A SYN that nobody takes yet is repeated by the kernel after a second only.
	return &http.Client{Transport: &http.Transport{DialContext: guest.Dial, DisableKeepAlives: true}}
}

func (f *floor) close(ctx context.Context) error {
	return errors.Join(
		f.slots.Close(ctx),
		gvisor.RemoveAll(filepath.Join(f.dir, "root"), floorTag),
		os.RemoveAll(f.dir),
	)
}

// bare is one sandbox of the floor's.
type bare struct {
	floor  *floor
	id     string
	bundle string
	slot   *network.Slot
}

// boot makes a sandbox and returns it with the time from `runsc create` to the
// guest agent's first answer.
func (f *floor) boot(ctx context.Context) (*bare, time.Duration, error) {
	return f.start(ctx, func(b *bare) error {
		if err := f.run(ctx, b.bundle, "create", "--bundle", b.bundle, b.id); err != nil {
			return err
		}
		return f.run(ctx, b.bundle, "start", b.id)
	})
}

// restore makes a sandbox of an image that checkpoint wrote, likewise.
func (f *floor) restore(ctx context.Context, image string) (*bare, time.Duration, error) {
	return f.start(ctx, func(b *bare) error {
		return f.run(ctx, b.bundle, "restore", "--detach", "--image-path", image, "--bundle", b.bundle, b.id)
	})
}

func (f *floor) start(ctx context.Context, start func(*bare) error) (_ *bare, took time.Duration, err error) {
	b := &bare{floor: f, id: string(sandbox.NewID())}
	b.bundle = filepath.Join(f.dir, b.id)
	if b.slot, err = f.slots.Acquire(ctx, network.Policy{AllowInternet: true}); err != nil {
		return nil, 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.stop(ctx))
		}
	}()
	if err := f.writeBundle(b.bundle, b.slot); err != nil {
		return nil, 0, err
	}
	if err := b.slot.Prepare(); err != nil {
		return nil, 0, err
	}
	begin := time.Now()
	if err := start(b); err != nil {
		return nil, 0, err
	}
	if err := f.waitHealthy(ctx, b.slot.HostAddr); err != nil {
		return nil, 0, err
	}
	return b, time.Since(begin), nil
}

// checkpoint writes the sandbox into dir, which it makes, and thereby ends it.
func (b *bare) checkpoint(ctx context.Context, dir string) (time.Duration, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return 0, err
	}
	begin := time.Now()
	err := b.floor.run(ctx, b.bundle, "checkpoint", "--compression=none", "--image-path", dir, b.id)
	return time.Since(begin), err
}

// firstOutput runs a command and returns the time to its first output. It asks the
// guest agent itself, with nothing between.
func (b *bare) firstOutput(ctx context.Context, path string, args ...string) (time.Duration, error) {
	at := fmt.Sprintf("http://%s:49983", b.slot.HostAddr)
	c, err := client.New(client.Config{APIURL: at, SandboxURL: at})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	begin := time.Now()
	err = firstOutput(ctx, c.Sandbox(client.Info{SandboxID: b.id}), path, args...)
	return time.Since(begin), err
}

func (b *bare) stop(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	_ = b.floor.run(ctx, b.bundle, "kill", b.id, "KILL") // it may have ended already
	err := b.floor.run(ctx, b.bundle, "delete", "-force", b.id)
	return errors.Join(err, os.RemoveAll(b.bundle), b.floor.slots.Release(ctx, b.slot))
}

func (f *floor) run(ctx context.Context, bundle string, args ...string) error {
	all := append([]string{
		"--root=" + filepath.Join(f.dir, "root"), "--platform=systrap", "--network=sandbox",
		"--overlay2=root:dir=" + bundle + ",size=1g", "--allow-suid", "--net-raw",
	}, args...)
	cmd := exec.CommandContext(ctx, f.runsc, all...)
	// What create leaves running must not hold a pipe of ours open: files only.
	log, err := os.Create(filepath.Join(bundle, "log"))
	if err != nil {
		return err
	}
	defer log.Close()
	cmd.Stderr = log
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(log.Name())
		return fmt.Errorf("runsc %s: %w: %s", args[0], err, text)
	}
	return nil
}

func (f *floor) waitHealthy(ctx context.Context, addr netip.Addr) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	retry := time.NewTicker(2 * time.Millisecond)
	defer retry.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, fmt.Sprintf("http://%s:49983/health", addr), nil)
		if err != nil {
			return err
		}
		resp, err := f.http.Do(req)
		if err == nil {
			_, _ = io.Copy(io.Discard, resp.Body)
			return resp.Body.Close()
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("bare sandbox does not answer: %w", err)
		case <-retry.C:
		}
	}
}

func (f *floor) writeBundle(dir string, slot *network.Slot) error {
	caps := []string{"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE", "CAP_NET_RAW", "CAP_SYS_CHROOT"}
	spec := specs.Spec{
		Version:  "1.0.2",
		Root:     &specs.Root{Path: f.rootfs},
		Hostname: "floor",
		Process: &specs.Process{
			Args: []string{runtime.GuestInitPath}, Cwd: "/", Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc"},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs"},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs"},
			{Destination: runtime.GuestInitPath, Type: "bind", Source: f.envd, Options: []string{"ro"}},
		},
		Linux: &specs.Linux{
			Namespaces: []specs.LinuxNamespace{
				{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
				{Type: specs.NetworkNamespace, Path: slot.InnerNetNS},
			},
			CgroupsPath: "/wrenn-" + floorTag + "/" + filepath.Base(dir),
		},
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make bundle: %w", err)
	}
	data, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("encode bundle: %w", err)
	}
	return os.WriteFile(filepath.Join(dir, "config.json"), data, 0o600)
}

// newest returns the last modified path that matches.
func newest(pattern string) (string, error) {
	paths, err := filepath.Glob(pattern)
	if err != nil {
		return "", err
	}
	var (
		best string
		when time.Time
	)
	for _, p := range paths {
		if fi, err := os.Stat(p); err == nil && (best == "" || fi.ModTime().After(when)) {
			best, when = p, fi.ModTime()
		}
	}
	if best == "" {
		return "", fmt.Errorf("no %s: start the platform with `make up` and give its directory with --data", pattern)
	}
	return best, nil
}
