package forward

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// exposer takes connections from outside and hands them over.
type exposer interface {
	// expose takes connections to exactly these addresses. It says whether that
	// was done: if not, also without an error, it is to be asked again.
	expose(paths map[netip.AddrPort]netip.AddrPort) (done bool, err error)
	// intact says whether what expose did lasts. It may be asked with each look.
	intact() bool
	// own lists the addresses on which the exposer itself listens.
	own() []netip.AddrPort
	// stop ends the taking of connections, close all else.
	stop()
	close()
}

// server forwards a connection to an outside address; fresh says that the sandbox
// may have come to listen there itself.
type server func(ctx context.Context, conn *net.TCPConn, to netip.AddrPort, fresh bool)

// accept hands over connections until the listener is closed.
func accept(ctx context.Context, l *net.TCPListener, handle func(*net.TCPConn)) {
	for {
		conn, err := l.AcceptTCP()
		switch {
		case err == nil:
			handle(conn)
		case errors.Is(err, net.ErrClosed) || ctx.Err() != nil:
			return
		default: // no descriptors or memory: they come back
			select {
			case <-time.After(10 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	}
}

// listening exposes by listening on the addresses. It is for where packets
// cannot be redirected. gVisor lets others listen on all addresses nevertheless;
// Linux does not, and there it is a stopgap.
type listening struct {
	ctx   context.Context //nolint:containedctx // that of Run, which owns it
	serve server
	loops sync.WaitGroup
	open  map[netip.AddrPort]*net.TCPListener
}

func newListening(ctx context.Context, serve server) *listening {
	return &listening{ctx: ctx, serve: serve, open: make(map[netip.AddrPort]*net.TCPListener)}
}

func (e *listening) expose(paths map[netip.AddrPort]netip.AddrPort) (done bool, failed error) {
	for at, l := range e.open {
		if _, ok := paths[at]; !ok {
			l.Close()
			delete(e.open, at)
		}
	}
	done = true
	for at := range paths {
		if e.open[at] != nil {
			continue
		}
		config := net.ListenConfig{Control: share}
		l, err := config.Listen(e.ctx, "tcp", at.String())
		if err != nil {
			// Somebody was faster, or the address is not ready yet: again later.
			done = false
			if !errors.Is(err, unix.EADDRINUSE) && !errors.Is(err, unix.EADDRNOTAVAIL) {
				failed = fmt.Errorf("forward port: %w", err)
			}
			continue
		}
		listener := l.(*net.TCPListener)
		e.open[at] = listener
		e.loops.Go(func() {
			accept(e.ctx, listener, func(c *net.TCPConn) { e.serve(e.ctx, c, at, false) })
		})
	}
	return done, failed
}

// share allows others to bind the port in every way that the kernel knows.
func share(_, _ string, conn syscall.RawConn) error {
	var failed error
	err := conn.Control(func(fd uintptr) {
		failed = errors.Join(
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1),
			unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEPORT, 1),
		)
	})
	return errors.Join(err, failed)
}

func (e *listening) intact() bool { return true }

func (e *listening) own() []netip.AddrPort {
	own := make([]netip.AddrPort, 0, len(e.open))
	for at := range e.open {
		own = append(own, at)
	}
	return own
}

func (e *listening) close() {}

func (e *listening) stop() {
	for _, l := range e.open {
		l.Close()
	}
	e.loops.Wait()
}
