package forward

import (
	"context"
	"errors"
	"io"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// buffers hold what has been read and not yet written. A connection on which
// nothing comes has none.
var buffers = sync.Pool{New: func() any { return new([32 << 10]byte) }}

// join passes on what comes on each connection to the other until both
// directions are done: ends of stream one by one, and a reset as a reset.
func join(ctx context.Context, a, b *net.TCPConn) {
	abort := func() {
		reset(a)
		reset(b)
	}
	stop := context.AfterFunc(ctx, abort)
	defer stop()
	var other sync.WaitGroup
	other.Go(func() {
		if pass(a, b) != nil {
			abort()
		}
	})
	if pass(b, a) != nil {
		abort()
	}
	other.Wait()
	a.Close()
	b.Close()
}

// pass writes to dst what it reads from src, and then ends that direction.
func pass(dst, src *net.TCPConn) error {
	conn, err := src.SyscallConn()
	if err != nil {
		return err
	}
	for {
		buffer, n, err := read(conn.Read)
		if errors.Is(err, io.EOF) {
			return dst.CloseWrite()
		}
		if err != nil {
			return err
		}
		_, err = dst.Write(buffer[:n])
		buffers.Put(buffer)
		if err != nil {
			return err
		}
	}
}

// read waits until there is something to read and only then takes a buffer.
func read(wait func(func(fd uintptr) bool) error) (buffer *[32 << 10]byte, n int, err error) {
	failed := wait(func(fd uintptr) bool {
		buffer = buffers.Get().(*[32 << 10]byte)
		for {
			n, err = unix.Read(int(fd), buffer[:])
			if !errors.Is(err, unix.EINTR) {
				break
			}
		}
		if err != nil || n == 0 {
			buffers.Put(buffer)
			buffer = nil
		}
		return !errors.Is(err, unix.EAGAIN)
	})
	switch {
	case failed != nil:
		return nil, 0, failed
	case err == nil && n == 0:
		return nil, 0, io.EOF
	}
	return buffer, n, err
}

// reset closes a connection so that its peer learns that it failed.
func reset(c *net.TCPConn) {
	_ = c.SetLinger(0) // it may be closed already
	c.Close()
}
