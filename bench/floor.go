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

	"github.com/wrenn/wrenn/internal/network"
	"github.com/wrenn/wrenn/internal/runtime"
	"github.com/wrenn/wrenn/internal/runtime/gvisor"
)

// floor makes sandboxes with nothing of the platform: the bare commands `runsc
// create` and `runsc start` on the same template and guest agent, in a network
// slot prepared ahead, as the platform's are.
type floor struct {
	runsc, envd, rootfs string
	dir                 string
	slots               *network.Pool
	http                *http.Client
}

const floorTag = "bbbb"

// newFloor uses what the platform in dataDir uses.
func newFloor(ctx context.Context, dataDir string) (*floor, error) {
	f := &floor{http: &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}}
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
		Tag: floorTag, CIDR: netip.MustParsePrefix("10.251.0.0/16"), Ready: 2, Log: slog.New(slog.DiscardHandler),
	}, nil)
	if err != nil {
		os.RemoveAll(f.dir)
		return nil, fmt.Errorf("prepare floor's network: %w", err)
	}
	return f, nil
}

func (f *floor) close(ctx context.Context) error {
	return errors.Join(
		f.slots.Close(ctx),
		gvisor.RemoveAll(filepath.Join(f.dir, "root"), floorTag),
		os.RemoveAll(f.dir),
	)
}

// measure makes one sandbox and returns the time from `runsc create` to the
// guest agent's first answer.
func (f *floor) measure(ctx context.Context, id string) (took time.Duration, err error) {
	slot, err := f.slots.Acquire(ctx, network.Policy{AllowInternet: true})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, f.slots.Release(context.WithoutCancel(ctx), slot)) }()
	bundle := filepath.Join(f.dir, id)
	if err := f.writeBundle(bundle, slot); err != nil {
		return 0, err
	}
	if err := slot.Prepare(); err != nil {
		return 0, err
	}
	defer func() {
		ctx := context.WithoutCancel(ctx)
		_ = f.run(ctx, bundle, "kill", id, "KILL") // it may have ended already
		if derr := f.run(ctx, bundle, "delete", "-force", id); err == nil {
			err = derr
		}
		os.RemoveAll(bundle)
	}()
	begin := time.Now()
	if err := f.run(ctx, bundle, "create", "--bundle", bundle, id); err != nil {
		return 0, err
	}
	if err := f.run(ctx, bundle, "start", id); err != nil {
		return 0, err
	}
	if err := f.waitHealthy(ctx, slot.HostAddr); err != nil {
		return 0, err
	}
	return time.Since(begin), nil
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
