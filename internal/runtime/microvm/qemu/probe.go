package qemu

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
)

// probeTime is how long a machine may take to boot its kernel: with KVM a second,
// and some in emulation.
const probeTime = 60 * time.Second

// Probe boots the kernel in a machine that has nothing else, and sees it get as far
// as its first program.
func (q *Monitor) Probe(ctx context.Context, k kernel.Kernel) error {
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, q.binary, append(q.machineArgs(1),
		"-m", "256M", "-kernel", k.Vmlinux, "-initrd", k.Initramfs, "-append", kernel.ProbeArgs(), "-serial", "stdio")...)
	said, err := cmd.CombinedOutput()
	switch {
	case kernel.Booted(string(said)):
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("qemu with %s does not boot Linux here in time", q.accel)
	case err != nil:
		return fmt.Errorf("qemu with %s does not run here: %w: %.300s", q.accel, err, strings.TrimSpace(string(said)))
	default:
		return errors.New("qemu does not boot the kernel that is installed: " + lastLine(string(said)))
	}
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
