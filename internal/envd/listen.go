package envd

import (
	"context"
	"net"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

const (
	// maxInside bounds the connections that the sandbox's own programs have to
	// the agent. Each costs it some 20 KiB, and they can ask for any number.
	maxInside = 512
	// maxOutside bounds those that come through the host.
	maxOutside = 8192
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

// door sorts the connections of a listener into those from inside the sandbox
// and those through the host, so that the first cannot use up what the second
// need. Its own Accept returns the second; what is too much of either is closed.
type door struct {
	net.Listener
	outside chan struct{} // holds one token for each connection that is open
	in      inside
}

// inside is the listener of the connections from inside the sandbox.
type inside struct {
	net.Listener
	slots  chan struct{}
	conns  chan net.Conn // as large as slots: sending never waits
	closed chan struct{}
	once   sync.Once
}

// newDoor returns the listeners for both kinds of connection. The one for those
// from inside gets its connections only while the other's Accept is called.
func newDoor(l net.Listener, mostInside, mostOutside int) *door {
	return &door{
		Listener: l,
		outside:  make(chan struct{}, mostOutside),
		in: inside{
			Listener: l,
			slots:    make(chan struct{}, mostInside),
			conns:    make(chan net.Conn, mostInside),
			closed:   make(chan struct{}),
		},
	}
}

// Accept waits for the next connection through the host.
func (d *door) Accept() (net.Conn, error) {
	for {
		conn, err := d.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if fromInside(conn) {
			if counted := enter(conn, d.in.slots); counted != nil {
				d.in.conns <- counted
			}
		} else if counted := enter(conn, d.outside); counted != nil {
			return counted, nil
		}
	}
}

// Accept waits for the next connection from inside.
func (in *inside) Accept() (net.Conn, error) {
	select {
	case conn := <-in.conns:
		return conn, nil
	case <-in.closed:
		return nil, net.ErrClosed
	}
}

// Close ends Accept, and closes what nobody has accepted.
func (in *inside) Close() error {
	in.once.Do(func() { close(in.closed) })
	for {
		select {
		case conn := <-in.conns:
			conn.Close()
		default:
			return nil
		}
	}
}

// fromInside reports whether the peer has an address of the sandbox's own: a
// loopback one, or that at which it reached us.
func fromInside(conn net.Conn) bool {
	peer, ok := conn.RemoteAddr().(*net.TCPAddr)
	if !ok {
		return false
	}
	own, ok := conn.LocalAddr().(*net.TCPAddr)
	return peer.IP.IsLoopback() || ok && own.IP.Equal(peer.IP)
}

// enter counts a connection for as long as it is open. When there are too many
// it closes it, without the long goodbye that would cost the kernel's memory,
// and returns nil.
func enter(conn net.Conn, slots chan struct{}) net.Conn {
	tcp, ok := conn.(*net.TCPConn)
	if !ok {
		return conn
	}
	select {
	case slots <- struct{}{}:
		return &counted{TCPConn: tcp, leave: sync.OnceFunc(func() { <-slots })}
	default:
		_ = tcp.SetLinger(0)
		tcp.Close()
		return nil
	}
}

// counted is a connection that gives its place back when it is closed. It has
// all methods of the connection, the quick ways to send files among them.
type counted struct {
	*net.TCPConn
	leave func()
}

func (c *counted) Close() error {
	defer c.leave()
	return c.TCPConn.Close()
}
