package envd

import (
	"context"
	"net"
	"syscall"

	"golang.org/x/sys/unix"
)

// Listen opens the agent's port so that nobody else in the sandbox can. Go lets
// listeners reuse addresses; where that is on, gVisor gives any process the same
// port on one of the addresses, and with it every request and the access token.
func Listen(address string) (net.Listener, error) {
	config := net.ListenConfig{Control: func(_, _ string, conn syscall.RawConn) error {
		var refused error
		err := conn.Control(func(fd uintptr) {
			refused = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 0)
		})
		if err != nil {
			return err
		}
		return refused
	}}
	return config.Listen(context.Background(), "tcp", address)
}
