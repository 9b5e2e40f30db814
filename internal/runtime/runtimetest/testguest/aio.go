package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// iocb is the kernel's struct of that name (linux/aio_abi.h), little-endian.
type iocb struct {
	_      [2]uint64
	opcode uint16 // 0 reads, 1 writes
	_      int16
	fd     uint32
	buf    uint64
	size   uint64
	offset int64
	_, _   uint64
}

type ioEvent struct {
	_, _   uint64
	result int64
	_      int64
}

// askAtOnce writes n blocks of a file at once, somewhere in it and past the page cache,
// then reads as many, and so on.
func askAtOnce(path string, n, times int) error {
	const block = 4096
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if size < block {
		return errors.New("it is too small")
	}
	// What the kernel writes to is no memory of Go's.
	memory, err := unix.Mmap(-1, 0, n*block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return err
	}
	defer unix.Munmap(memory)
	var ctx uintptr
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, uintptr(n), uintptr(unsafe.Pointer(&ctx)), 0); errno != 0 {
		return fmt.Errorf("io_setup: %w", errno)
	}
	defer unix.Syscall(unix.SYS_IO_DESTROY, ctx, 0, 0)
	requests, pointers, events := make([]iocb, n), make([]*iocb, n), make([]ioEvent, n)
	for round := range times {
		for i := range requests {
			requests[i] = iocb{
				opcode: uint16((round + 1) % 2),
				fd:     uint32(f.Fd()), buf: uint64(uintptr(unsafe.Pointer(&memory[i*block]))), size: block,
				offset: rand.Int64N(size/block) * block,
			}
			pointers[i] = &requests[i]
		}
		sent, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, ctx, uintptr(n), uintptr(unsafe.Pointer(&pointers[0])))
		if errno != 0 {
			return fmt.Errorf("io_submit: %w", errno)
		}
		if _, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, ctx, sent, sent, uintptr(unsafe.Pointer(&events[0])), 0, 0); errno != 0 {
			return fmt.Errorf("io_getevents: %w", errno)
		}
		for _, e := range events[:sent] {
			if e.result != block {
				return fmt.Errorf("a request of %d bytes gives %d", block, e.result)
			}
		}
	}
	return nil
}

func askDisk(w http.ResponseWriter, r *http.Request) {
	answer(w, askAtOnce(r.FormValue("path"), number(r, "requests"), number(r, "times")))
}
