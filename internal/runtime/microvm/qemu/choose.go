package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
)

// kvmTime is how long KVM may take to boot a kernel. One that cannot boot it at all
// hangs.
const kvmTime = 10 * time.Second

// verdict is what came of trying KVM, and what that depends on.
type verdict struct {
	Boot   string `json:"boot"` // the host's boot id
	QEMU   string `json:"qemu"`
	Kernel string `json:"kernel"`
	KVM    bool   `json:"kvm"`
	Reason string `json:"reason,omitempty"` // why not
}

// Choose says what to run machines with: KVM where it boots the kernel, else
// emulation, with the reason. What was found is kept in the file, which may be
// removed at any time, and holds until the host is booted again.
func Choose(ctx context.Context, k kernel.Kernel, file string) (Accelerator, string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return TCG, "", err
	}
	q, err := New(ctx, Config{Accelerator: KVM})
	if err != nil {
		return TCG, "", err
	}
	now := verdict{Boot: strings.TrimSpace(string(boot)), QEMU: q.Version(), Kernel: k.SHA256}
	var known verdict
	data, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return TCG, "", fmt.Errorf("read what is known of KVM: %w", err)
	}
	if err := json.Unmarshal(data, &known); err == nil && known.Boot == now.Boot && known.QEMU == now.QEMU && known.Kernel == now.Kernel {
		return known.accelerator(), known.Reason, nil
	}
	if err := tryKVM(ctx, q, k); err != nil {
		now.Reason = err.Error()
	} else {
		now.KVM = true
	}
	if err := ctx.Err(); err != nil {
		return TCG, "", err
	}
	if data, err = json.Marshal(now); err != nil {
		return TCG, "", err
	}
	return now.accelerator(), now.Reason, os.WriteFile(file, data, 0o600)
}

func (v verdict) accelerator() Accelerator {
	if v.KVM {
		return KVM
	}
	return TCG
}

func tryKVM(ctx context.Context, q *Monitor, k kernel.Kernel) error {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("KVM cannot be used: %w", err)
	}
	f.Close()
	ctx, cancel := context.WithTimeout(ctx, kvmTime)
	defer cancel()
	return q.Probe(ctx, k)
}
