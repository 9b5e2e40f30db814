package pager

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/kvm"
)

// counter is a guest of 32 bits. It adds 1 to the first word of edx pages, from edi on
// every second one; then it takes ecx words from esi on into a sum in ebx.
var counter = []byte{
	0x83, 0x07, 0x01, // add dword [edi], 1
	0x81, 0xc7, 0x00, 0x20, 0x00, 0x00, // add edi, 8192
	0x4a,       // dec edx
	0x75, 0xf4, // jnz to the start
	0x03, 0x1e, // add ebx, [esi]
	0xd1, 0xc3, // rol ebx, 1
	0x83, 0xc6, 0x04, // add esi, 4
	0x49,       // dec ecx
	0x75, 0xf6, // jnz to the add before
	0xf4, // hlt
}

const (
	counterAt   = 1 << 20 // where the guest's memory begins, with its code
	counterTime = 30 * time.Second
)

func init() { runOnKVM = count }

// count runs the guest in the memory, and compares what it saw and what it left.
func count(o childOrder, mem []byte) error {
	want, err := os.ReadFile(o.Memory)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), counterTime)
	defer cancel()
	pages := len(mem)/4096 - 1
	r, err := kvm.Run(ctx, kvm.Guest{Memory: mem, At: counterAt, Flat: true, Registers: kvm.Registers{
		IP: counterAt, DI: counterAt + 4096, DX: uint64(pages+1) / 2, SI: counterAt + 4096, CX: uint64(pages) * 1024,
	}}, nil)
	if err != nil {
		return err
	}
	sum := uint32(0)
	for at := 4096; at < len(want); at += 4 {
		word := want[at:][:4]
		if at%8192 == 4096 {
			binary.LittleEndian.PutUint32(word, binary.LittleEndian.Uint32(word)+1)
		}
		sum = bits.RotateLeft32(sum+binary.LittleEndian.Uint32(word), 1)
	}
	if uint32(r.BX) != sum {
		return fmt.Errorf("the guest comes to the sum %#x, want %#x", r.BX, sum)
	}
	for i := range len(want) / 4096 {
		if !bytes.Equal(mem[i*4096:][:4096], want[i*4096:][:4096]) {
			return fmt.Errorf("page %d is wrong", i)
		}
	}
	return nil
}

// TestKVM serves the faults of a guest of KVM, its code's too.
func TestKVM(t *testing.T) {
	t.Parallel()
	dev, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skip("KVM cannot be opened here: ", errors.Unwrap(err))
	}
	dev.Close()
	f := newFixture(t, 97, 3, nil)
	copy(f.data, counter)
	f.rewrite(t)
	for _, around := range []int64{4096, 0} {
		vm := f.vm(fmt.Sprint("around", around))
		vm.Around = around
		f.monitor(t, vm, "kvm", 1, false).succeeds(t)
		st := f.ends(t, vm.ID)
		if st.Reason != "" || st.Copied+st.Zeroed != int64(len(f.data)) || around == 4096 && st.Faults < 97 {
			t.Errorf("%+v: want every page put in once, and no reason", st)
		}
	}
	vm := f.vm("prefetched") // while the guest runs
	vm.Around, vm.WorkingSet = 4096, f.dir+"/set"
	var set []uint32
	for i := range 97 {
		set = append(set, uint32(96-i))
	}
	if err := WriteWorkingSet(vm.WorkingSet, set); err != nil {
		t.Fatal(err)
	}
	f.monitor(t, vm, "kvm", 1, false).succeeds(t)
	if st := f.ends(t, vm.ID); st.Reason != "" {
		t.Errorf("ended: %s", st.Reason)
	}
}
