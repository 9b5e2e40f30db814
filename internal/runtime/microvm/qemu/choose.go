package qemu

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/wrenn/wrenn/internal/kvm"
	"github.com/wrenn/wrenn/internal/runtime/microvm/kernel"
)

// kvmTime is how long KVM may take to boot a kernel. One that cannot boot it at all
// hangs.
const kvmTime = 10 * time.Second

// Choose says what to run machines with: KVM where it boots the kernel, else
// emulation, with the reason. What was found is kept in the file.
func Choose(ctx context.Context, k kernel.Kernel, file string) (Accelerator, string, error) {
	q, err := New(ctx, Config{Accelerator: KVM})
	if err != nil {
		return TCG, "", err
	}
	v, err := kvm.Decide(ctx, file, "qemu "+q.Version(), k.Name, func(ctx context.Context) error { return tryKVM(ctx, q, k) })
	if err != nil {
		return TCG, "", err
	}
	if v.Refusal != "" {
		return TCG, v.Refusal, nil
	}
	return KVM, "", nil
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
