package firecracker

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"testing"
	"time"
)

func TestTinyGuest(t *testing.T) {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skip("KVM cannot be opened here: ", errors.Unwrap(err))
	}
	kvm.Close()
	if err := tryKVM(t.Context()); err != nil {
		t.Fatal(err)
	}
	well := bytes.Clone(tiny)
	defer func() { tiny = well }()

	tiny = append(bytes.Clone(well[:3]), 0x28, 0xd8, 0xee, 0xf4) // sub al, bl
	if err := tryKVM(t.Context()); err == nil || !strings.Contains(err.Error(), "to 38") {
		t.Errorf("a guest that counts wrong: %v", err)
	}
	tiny = []byte{0xeb, 0xfe} // jmp to itself
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := tryKVM(ctx); err == nil || !strings.Contains(err.Error(), "does not end") {
		t.Errorf("a guest that does not end: %v", err)
	}
}
