package firecracker

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/kvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// probeTime is how long a kernel may take to boot: with KVM it takes far less than a
// second.
const probeTime = 5 * time.Second

// Probe implements microvm.Monitor. That KVM opens and runs a few instructions does
// not mean that it runs Linux: so it boots one.
func (f *Monitor) Probe(ctx context.Context, k kernel.Kernel) error {
	v, err := kvm.Decide(ctx, filepath.Join(f.cfg.Data, kvm.FirecrackerVerdict), "firecracker "+f.can.Version.String(), k.Name,
		func(ctx context.Context) error { return f.try(ctx, k) })
	if err != nil {
		return err
	}
	return refused(v.Refusal)
}

func refused(words string) error {
	if words == "" {
		return nil
	}
	return &sandbox.Error{Kind: sandbox.ErrUnavailable, Message: "Firecracker cannot run here: " + words}
}

func (f *Monitor) try(ctx context.Context, k kernel.Kernel) error {
	if err := tryKVM(ctx); err != nil {
		return fmt.Errorf("%w: use a host with KVM, or another runtime", err)
	}
	return f.tryLinux(ctx, k)
}

// tryLinux boots the kernel as far as its first program, which says that it has no
// disk and ends.
func (f *Monitor) tryLinux(ctx context.Context, k kernel.Kernel) error {
	config, err := json.Marshal(map[string]any{
		"boot-source":    BootSource{Kernel: k.Vmlinux, Initrd: k.Initramfs, Args: f.commandLine(kernel.ProbeArgs())},
		"drives":         []Drive{},
		"machine-config": MachineConfig{CPUs: 1, MemoryMiB: 128},
	})
	if err != nil {
		return err
	}
	// In memory: a disk that is full says nothing of KVM.
	fd, err := unix.MemfdCreate("config", unix.MFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("make configuration: %w", err)
	}
	file := os.NewFile(uintptr(fd), "config")
	defer file.Close()
	if _, err := file.Write(config); err != nil {
		return fmt.Errorf("make configuration: %w", err)
	}
	limited, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	cmd := exec.CommandContext(limited, f.cfg.Binary, "--no-api", "--config-file", "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{file}
	cmd.WaitDelay = time.Second
	said, err := cmd.CombinedOutput()
	switch {
	case kernel.Booted(string(said)):
		return nil
	case limited.Err() != nil:
		return fmt.Errorf("KVM of this host runs a small guest but boots no Linux within %v: use a host whose KVM does, or another runtime", probeTime)
	case err != nil:
		return fmt.Errorf("it does not start (%w): %s", err, lastLine(said))
	}
	return fmt.Errorf("it does not boot the kernel that is installed: %s", lastLine(said))
}

func lastLine(text []byte) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return fmt.Sprintf("%.300s", strings.TrimSpace(lines[len(lines)-1]))
}

func hostRelease() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

// processor names the host's, on which the state of a machine depends.
func processor() string {
	data, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return "unknown"
	}
	for line := range strings.Lines(string(data)) {
		if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return "unknown"
}
