package kvm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Numbers of linux/kvm.h.
const (
	getAPIVersion   = 0xae00
	createVM        = 0xae01
	getVCPUMmapSize = 0xae04
	createVCPU      = 0xae41
	setMemory       = 0x4020ae46
	run             = 0xae80
	getRegs         = 0x8090ae81
	setRegs         = 0x4090ae82
	getSregs        = 0x8138ae83
	setSregs        = 0x4138ae84

	apiVersion = 12
	exitIO     = 2
	exitHalt   = 5
)

// Guest is what a processor is started with.
type Guest struct {
	Memory    []byte // whole pages of this process
	At        uint64 // where the guest has them
	Registers Registers

	// Flat has the processor begin with 32 bits and segments that are all of the
	// address space; else it begins as it is when it is switched on.
	Flat bool
}

// Registers are the general ones, in KVM's order.
type Registers struct {
	AX, BX, CX, DX, SI, DI, SP, BP uint64

	R8, R9, R10, R11, R12, R13, R14, R15 uint64

	IP, Flags uint64
}

// Run runs a guest until it halts, and gives its registers then. out, which may be nil,
// is called with the bytes that it writes to ports.
func Run(ctx context.Context, g Guest, out func(byte)) (Registers, error) {
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return Registers{}, fmt.Errorf("open KVM: %w", err)
	}
	defer kvm.Close()
	if v, err := ioctl(kvm.Fd(), getAPIVersion, 0); err != nil || v != apiVersion {
		return Registers{}, fmt.Errorf("ask KVM for its version: it says %d (%w)", v, err)
	}
	vm, err := ioctl(kvm.Fd(), createVM, 0)
	if err != nil {
		return Registers{}, fmt.Errorf("make virtual machine: %w", err)
	}
	defer unix.Close(int(vm))
	// slot and flags, address in the guest, size, address here
	region := [4]uint64{0, g.At, uint64(len(g.Memory)), uint64(uintptr(unsafe.Pointer(&g.Memory[0])))}
	if _, err := ioctl(vm, setMemory, uintptr(unsafe.Pointer(&region))); err != nil {
		return Registers{}, fmt.Errorf("give memory to virtual machine: %w", err)
	}
	cpu, err := ioctl(vm, createVCPU, 0)
	if err != nil {
		return Registers{}, fmt.Errorf("make virtual processor: %w", err)
	}
	defer unix.Close(int(cpu))
	size, err := ioctl(kvm.Fd(), getVCPUMmapSize, 0)
	if err != nil {
		return Registers{}, fmt.Errorf("make virtual processor: %w", err)
	}
	shared, err := unix.Mmap(int(cpu), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return Registers{}, fmt.Errorf("map virtual processor: %w", err)
	}
	defer func() { _ = unix.Munmap(shared) }() // fails for no reason that is in our hands
	if err := g.set(cpu); err != nil {
		return Registers{}, err
	}
	if err := runToHalt(ctx, cpu, shared, out); err != nil {
		return Registers{}, err
	}
	var r Registers
	if _, err := ioctl(cpu, getRegs, uintptr(unsafe.Pointer(&r))); err != nil {
		return r, fmt.Errorf("read registers: %w", err)
	}
	return r, nil
}

// Of the special registers, struct kvm_sregs.
const (
	segmentSize = 24
	segments    = 6 // cs, ds, es, fs, gs, ss
	cr0         = 8*segmentSize + 2*16
)

func (g Guest) set(cpu uintptr) error {
	var special [0x138]byte
	if _, err := ioctl(cpu, getSregs, uintptr(unsafe.Pointer(&special))); err != nil {
		return fmt.Errorf("read registers: %w", err)
	}
	clear(special[0:8])   // cs.base
	clear(special[12:14]) // cs.selector
	if g.Flat {
		special[cr0] |= 1 // protected mode
		for i := range segments {
			kind := byte(3) // data, written and used
			if i == 0 {
				kind = 11 // code
			}
			s := special[i*segmentSize:][:segmentSize]
			clear(s)
			binary.LittleEndian.PutUint32(s[8:], 0xffffffff)     // limit
			s[12] = 8                                            // selector
			s[14], s[15], s[17], s[18], s[20] = kind, 1, 1, 1, 1 // present, 32 bits, no system's, in pages
		}
	}
	if _, err := ioctl(cpu, setSregs, uintptr(unsafe.Pointer(&special))); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	r := g.Registers
	r.Flags |= 2 // always set
	if _, err := ioctl(cpu, setRegs, uintptr(unsafe.Pointer(&r))); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	return nil
}

// runToHalt runs the processor. shared is struct kvm_run.
func runToHalt(ctx context.Context, cpu uintptr, shared []byte, out func(byte)) error {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	thread := unix.Gettid()
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		shared[1] = 1 // immediate_exit; the signal ends the run that is under way
		_ = unix.Tgkill(unix.Getpid(), thread, unix.SIGURG)
	})
	defer func() {
		if !stop() {
			<-stopped // the caller unmaps what is written to
		}
	}()
	for {
		if _, err := ioctl(cpu, run, 0); err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if errors.Is(err, unix.EINTR) || errors.Is(err, unix.EAGAIN) {
				continue
			}
			return fmt.Errorf("run virtual processor: %w", err)
		}
		switch reason := binary.LittleEndian.Uint32(shared[8:]); reason {
		case exitIO:
			if at := binary.LittleEndian.Uint64(shared[40:]); out != nil && at < uint64(len(shared)) {
				out(shared[at])
			}
		case exitHalt:
			return nil
		default:
			return fmt.Errorf("the guest stops for reason %d", reason)
		}
	}
}

func ioctl(fd, number, arg uintptr) (uintptr, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, number, arg)
	if errno != 0 {
		return 0, errno
	}
	return r, nil
}
