package firecracker

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/wrenn/wrenn/internal/kvm"
)

// tiny is a guest for a processor as it is when it is switched on. It adds two
// registers, writes the sum to a port and halts.
var tiny = []byte{
	0xba, 0xf8, 0x03, // mov dx, 0x3f8
	0x00, 0xd8, // add al, bl
	0xee, // out dx, al
	0xf4, // hlt
}

const (
	tinyAt   = 0x1000 // where it is in the guest's memory
	tinyTime = 2 * time.Second
)

// tryKVM runs a guest of four instructions.
func tryKVM(ctx context.Context) error {
	memory, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("make memory: %w", err)
	}
	defer func() { _ = unix.Munmap(memory) }() // fails for no reason that is in our hands
	copy(memory, tiny)
	limited, cancel := context.WithTimeout(ctx, tinyTime)
	defer cancel()
	said := byte(0)
	_, err = kvm.Run(limited, kvm.Guest{Memory: memory, At: tinyAt, Registers: kvm.Registers{AX: 40, BX: 2, IP: tinyAt}}, func(b byte) { said = b })
	switch {
	case limited.Err() != nil && errors.Is(err, limited.Err()):
		return fmt.Errorf("a guest of four instructions does not end within %v", tinyTime)
	case err != nil:
		return fmt.Errorf("run a guest of four instructions: %w", err)
	case said != 42:
		return fmt.Errorf("a guest of four instructions adds 40 and 2 to %d", said)
	}
	return nil
}
