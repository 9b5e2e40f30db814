//go:build !amd64

package firecracker

import (
	"context"
	"fmt"
	"os"
)

// tryKVM opens KVM. What it can do, the boot of a kernel shows.
func tryKVM(context.Context) error {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open KVM: %w", err)
	}
	return kvm.Close()
}
