// Package hangup tells clients that have gone from clients that have only ended their
// direction of a connection and wait for the answer still (RFC 9112, 9.6). The end of
// what they send looks the same.
package hangup

import (
	"errors"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Await waits, on a connection that has been read to its end, until the other side
// resets it, which it does at the first byte that comes after it has gone, or until it
// is closed here: both are no error. When the connection's read deadline passes first
// the error is os.ErrDeadlineExceeded. Connections over others (TLS) are looked through;
// one without a socket is errors.ErrUnsupported.
func Await(conn net.Conn) error {
	for {
		over, ok := conn.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		conn = over.NetConn()
	}
	sc, ok := conn.(syscall.Conn)
	if !ok {
		return errors.ErrUnsupported
	}
	raw, err := sc.SyscallConn()
	if err != nil {
		return nil // it is closed
	}
	// Asked again whenever something happens on the connection.
	err = raw.Read(func(fd uintptr) bool {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		return err != nil || info.State == unix.BPF_TCP_CLOSE
	})
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
