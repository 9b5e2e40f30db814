package firecracker_test

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"testing"
)

// A guest of a few instructions, for hosts whose KVM runs no Linux: it says a word on
// the serial port and then counts for ever, in a page of its memory, and each count of
// 65,536 it writes the number to another one of some pages.
const (
	guestAt      = 1 << 20 // where it is in memory, and is entered: as Linux, in 64-bit mode
	guestCounter = guestAt + 0x1000
	guestPages   = guestAt + 0x10000 // 16 of them
)

var guestCode = []byte{
	0xfa,                   // cli
	0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
	0xb0, 'h', 0xee, // mov al, 'h'; out dx, al
	0xb0, 'i', 0xee, // mov al, 'i'; out dx, al
	0xb0, '\n', 0xee, // mov al, '\n'; out dx, al
	0xbf, 0x00, 0x10, 0x10, 0x00, // mov edi, guestCounter
	// loop:
	0xf3, 0x90, // pause
	0x48, 0xff, 0x07, // inc qword [rdi]
	0x48, 0x8b, 0x07, // mov rax, [rdi]
	0x66, 0x85, 0xc0, // test ax, ax
	0x75, 0xf3, // jnz loop
	0x48, 0x89, 0xc1, // mov rcx, rax
	0x48, 0xc1, 0xe9, 0x04, // shr rcx, 4
	0x81, 0xe1, 0x00, 0xf0, 0x00, 0x00, // and ecx, 0xf000
	0x48, 0x89, 0x81, 0x00, 0x00, 0x11, 0x00, // mov [rcx+guestPages], rax
	0xeb, 0xdd, // jmp loop
}

// guestKernel writes the guest as Firecracker takes a kernel: an ELF program.
func guestKernel(t *testing.T) string {
	t.Helper()
	const offset = 0x1000
	head := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	u16 := func(n ...uint16) {
		for _, n := range n {
			head = binary.LittleEndian.AppendUint16(head, n)
		}
	}
	u32 := func(n uint32) { head = binary.LittleEndian.AppendUint32(head, n) }
	u64 := func(n ...uint64) {
		for _, n := range n {
			head = binary.LittleEndian.AppendUint64(head, n)
		}
	}
	u16(2, 62) // a program, for x86-64
	u32(1)
	u64(guestAt, 64, 0) // entry, where what is loaded is listed, no sections
	u32(0)
	u16(64, 56, 1, 0, 0, 0)
	u32(1) // to be loaded
	u32(7) // read, write and execute
	size := uint64(len(guestCode))
	u64(offset, guestAt, guestAt, size, size, offset)
	path := filepath.Join(t.TempDir(), "vmlinux")
	data := append(append(head, make([]byte, offset-len(head))...), guestCode...)
	if err := os.WriteFile(path, data, 0o444); err != nil {
		t.Fatal(err)
	}
	return path
}
