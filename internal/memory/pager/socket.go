package pager

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// near calls f with a short path of a socket, by way of its directory's descriptor: in
// an address there is room for 107 bytes only.
func near(socket string, f func(address *net.UnixAddr) error) error {
	fd, err := unix.Open(filepath.Dir(socket), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open directory of %s: %w", socket, err)
	}
	defer unix.Close(fd)
	return f(&net.UnixAddr{Net: "unix", Name: fmt.Sprintf("/proc/self/fd/%d/%s", fd, filepath.Base(socket))})
}

func dial(ctx context.Context, socket string) (conn *net.UnixConn, err error) {
	err = near(socket, func(address *net.UnixAddr) error {
		c, err := new(net.Dialer).DialContext(ctx, "unix", address.Name)
		if err == nil {
			conn = c.(*net.UnixConn)
		}
		return err
	})
	return conn, err
}

// listener is a socket that its owner alone may connect to, until it is closed.
type listener struct {
	*net.UnixListener
	socket string
	once   sync.Once
}

func listen(socket string) (*listener, error) {
	l := &listener{socket: socket}
	err := near(socket, func(address *net.UnixAddr) (err error) {
		if l.UnixListener, err = net.ListenUnix("unix", address); err == nil {
			l.SetUnlinkOnClose(false) // that path is gone by then
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(socket, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// Close ends it and removes the socket.
func (l *listener) Close() error {
	l.once.Do(func() { os.Remove(l.socket) })
	return l.UnixListener.Close()
}
