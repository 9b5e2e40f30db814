package firecracker

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Numbers of linux/kvm.h.
const (
	kvmGetAPIVersion   = 0xae00
	kvmCreateVM        = 0xae01
	kvmGetVCPUMmapSize = 0xae04
	kvmCreateVCPU      = 0xae41
	kvmSetMemory       = 0x4020ae46
	kvmRun             = 0xae80
	kvmSetRegs         = 0x4090ae82
	kvmGetSregs        = 0x8138ae83
	kvmSetSregs        = 0x4138ae84

	kvmAPIVersion = 12
	kvmExitIO     = 2
	kvmExitHalt   = 5
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
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("open KVM: %w", err)
	}
	defer kvm.Close()
	if v, err := ioctl(kvm.Fd(), kvmGetAPIVersion, 0); err != nil || v != kvmAPIVersion {
		return fmt.Errorf("ask KVM for its version: it says %d (%w)", v, err)
	}
	vm, err := ioctl(kvm.Fd(), kvmCreateVM, 0)
	if err != nil {
		return fmt.Errorf("make virtual machine: %w", err)
	}
	defer unix.Close(int(vm))
	memory, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return fmt.Errorf("make memory: %w", err)
	}
	defer func() { _ = unix.Munmap(memory) }() // fails for no reason that is in our hands
	copy(memory, tiny)
	// slot and flags, address in the guest, size, address here
	region := [4]uint64{0, tinyAt, uint64(len(memory)), uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if _, err := ioctl(vm, kvmSetMemory, uintptr(unsafe.Pointer(&region))); err != nil {
		return fmt.Errorf("give memory to virtual machine: %w", err)
	}
	cpu, err := ioctl(vm, kvmCreateVCPU, 0)
	if err != nil {
		return fmt.Errorf("make virtual processor: %w", err)
	}
	defer unix.Close(int(cpu))
	size, err := ioctl(kvm.Fd(), kvmGetVCPUMmapSize, 0)
	if err != nil {
		return fmt.Errorf("make virtual processor: %w", err)
	}
	shared, err := unix.Mmap(int(cpu), 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map virtual processor: %w", err)
	}
	defer func() { _ = unix.Munmap(shared) }() // as above
	if err := setRegisters(cpu); err != nil {
		return err
	}
	return runTiny(ctx, cpu, shared)
}

func setRegisters(cpu uintptr) error {
	var sregs [0x138]byte
	if _, err := ioctl(cpu, kvmGetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return fmt.Errorf("read registers: %w", err)
	}
	clear(sregs[0:8])   // cs.base
	clear(sregs[12:14]) // cs.selector
	if _, err := ioctl(cpu, kvmSetSregs, uintptr(unsafe.Pointer(&sregs))); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	var regs [18]uint64 // rax, rbx, …, rip, rflags
	regs[0], regs[1], regs[16], regs[17] = 40, 2, tinyAt, 2
	if _, err := ioctl(cpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs))); err != nil {
		return fmt.Errorf("set registers: %w", err)
	}
	return nil
}

// runTiny runs the guest to its end. shared is struct kvm_run.
func runTiny(ctx context.Context, cpu uintptr, shared []byte) error {
	ctx, cancel := context.WithTimeout(ctx, tinyTime)
	defer cancel()
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
	said := byte(0)
	for {
		if _, err := ioctl(cpu, kvmRun, 0); err != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("a guest of four instructions does not end within %v", tinyTime)
			}
			if errors.Is(err, unix.EINTR) {
				continue
			}
			return fmt.Errorf("run virtual processor: %w", err)
		}
		switch reason := binary.LittleEndian.Uint32(shared[8:]); reason {
		case kvmExitIO:
			if at := binary.LittleEndian.Uint64(shared[40:]); at < uint64(len(shared)) {
				said = shared[at]
			}
		case kvmExitHalt:
			if said != 42 {
				return fmt.Errorf("a guest of four instructions adds 40 and 2 to %d", said)
			}
			return nil
		default:
			return fmt.Errorf("a guest of four instructions stops for reason %d", reason)
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
