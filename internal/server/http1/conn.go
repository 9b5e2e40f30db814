package http1

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/wrenn/wrenn/internal/hangup"
)

const (
	readBuffer  = 4 << 10
	largestHead = 16 << 10 // bytes; larger headers are net/http's
	// watchAfter is how long an answer may take before the client is watched.
	watchAfter = 20 * time.Millisecond
)

// conn is one connection of a client.
type conn struct {
	server *Server
	raw    net.Conn // bare TCP
	rw     net.Conn // raw, or TLS over it
	state  *tls.ConnectionState
	remote string      // address of the client
	busy   atomic.Bool // a request is being served

	ctx    context.Context // ends with the connection
	cancel context.CancelFunc

	buf     []byte // what has been read; the bytes of requests that were served are cut off
	idleSet time.Time
	answer  answer

	timer *time.Timer // starts watch
	mu    sync.Mutex  // guards what follows, and buf while watched
	open  bool        // a request is being served that may be watched
	watch chan struct{}
}

var (
	buffers = sync.Pool{New: func() any { b := make([]byte, 0, readBuffer); return &b }}
	writers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, 4<<10) }}
)

// serve serves requests until one is not for us or the connection ends.
func (c *conn) serve(config *tls.Config) {
	handOver := false
	defer func() {
		c.server.forget(c)
		if !handOver {
			c.rw.Close()
		}
	}()
	c.remote = c.raw.RemoteAddr().String()
	c.ctx, c.cancel = context.WithCancel(c.server.ctx)
	defer c.cancel()
	if config != nil {
		if !c.handshake(config) {
			return
		}
		if c.state.NegotiatedProtocol == "h2" {
			handOver = true
			c.server.hand(c.rw)
			return
		}
	}
	store := buffers.Get().(*[]byte)
	c.buf = (*store)[:0]
	defer func() {
		if cap(c.buf) == readBuffer {
			*store = c.buf[:0]
			buffers.Put(store)
		}
	}()
	for {
		r, end, err := c.readRequest()
		if err != nil {
			return
		}
		h := c.take(r)
		if h == nil {
			handOver = true
			c.handOver()
			return
		}
		c.buf = c.buf[:copy(c.buf, c.buf[end:])]
		if !c.serveRequest(h, r) {
			return
		}
	}
}

// take returns who serves a request, nil for net/http, which also sees to it that a
// request that nobody can judge ends nothing but its connection.
func (c *conn) take(r *http.Request) (h http.Handler) {
	defer func() {
		if p := recover(); p != nil {
			c.server.cfg.Log.Error("judging a request panicked", "host", r.Host, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
			h = nil
		}
	}()
	if r == nil {
		return nil
	}
	return c.server.cfg.Take(r)
}

func (c *conn) handshake(config *tls.Config) bool {
	ctx, cancel := context.WithTimeout(c.ctx, c.server.cfg.HeaderTimeout)
	defer cancel()
	t := tls.Server(c.raw, config)
	c.rw = t
	if err := t.HandshakeContext(ctx); err != nil {
		c.server.cfg.Log.Debug("TLS handshake", "client", c.raw.RemoteAddr(), "error", err)
		return false
	}
	state := t.ConnectionState()
	c.state = &state
	return true
}

// handOver gives the connection to net/http, with what has been read of it.
func (c *conn) handOver() {
	_ = c.rw.SetReadDeadline(time.Time{}) // fails only on a closed connection
	c.server.hand(&handed{Conn: c.rw, unread: append([]byte(nil), c.buf...), state: c.state})
}

// readRequest waits for a header and reads it. It returns nil without an error for
// one that is net/http's business, and where the header ends in buf.
func (c *conn) readRequest() (r *http.Request, end int, err error) {
	began := false
	for {
		if len(c.buf) > 0 {
			r, end, verdict := c.parse()
			switch verdict {
			case headGood:
				return r, end, nil
			case headForeign:
				return nil, 0, nil
			}
			if len(c.buf) >= largestHead {
				return nil, 0, nil
			}
			if !began {
				began = true
				c.idleSet = time.Time{}
				if err := c.rw.SetReadDeadline(time.Now().Add(c.server.cfg.HeaderTimeout)); err != nil {
					return nil, 0, err
				}
			}
		} else if err := c.setIdleDeadline(); err != nil {
			return nil, 0, err
		}
		if len(c.buf) == cap(c.buf) {
			c.buf = append(make([]byte, 0, 4*cap(c.buf)), c.buf...)
		}
		n, err := c.rw.Read(c.buf[len(c.buf):cap(c.buf)])
		c.buf = c.buf[:len(c.buf)+n]
		if n == 0 && err != nil {
			return nil, 0, err
		}
	}
}

// setIdleDeadline is spared when the last one is young.
func (c *conn) setIdleDeadline() error {
	now := time.Now()
	if now.Sub(c.idleSet) < c.server.cfg.IdleTimeout/60 {
		return nil
	}
	c.idleSet = now
	wait := c.server.cfg.IdleTimeout
	if c.answer.served == 0 {
		// A client that connects has something to say.
		wait, c.idleSet = c.server.cfg.HeaderTimeout, time.Time{}
	}
	return c.rw.SetReadDeadline(now.Add(wait))
}

// serveRequest has the request answered; it reports whether another may follow.
func (c *conn) serveRequest(h http.Handler, r *http.Request) (goOn bool) {
	c.busy.Store(true)
	defer c.busy.Store(false)
	a := &c.answer
	a.begin(c, r)
	defer a.release()
	c.expectWatch()
	defer func() {
		alive := c.endWatch()
		if p := recover(); p != nil {
			if err, ok := p.(error); !ok || !errors.Is(err, http.ErrAbortHandler) {
				c.server.cfg.Log.Error("request handler panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
			}
			goOn = false
			a.breakOff()
			return
		}
		goOn = a.finish() && alive && !r.Close && !c.server.isClosing()
	}()
	h.ServeHTTP(a, r)
	return true
}

func (s *Server) isClosing() bool {
	select {
	case <-s.closed:
		return true
	default:
		return false
	}
}

// expectWatch has the client watched if the answer takes long.
func (c *conn) expectWatch() {
	c.mu.Lock()
	c.open = true
	c.mu.Unlock()
	if c.timer == nil {
		c.timer = time.AfterFunc(watchAfter, c.watchClient)
	} else {
		c.timer.Reset(watchAfter)
	}
}

// watchClient reads what the client sends while its request is served: the end, if
// it has gone, or its next request.
func (c *conn) watchClient() {
	c.mu.Lock()
	if !c.open || c.watch != nil || len(c.buf) > 0 {
		c.mu.Unlock()
		return
	}
	done := make(chan struct{})
	c.watch = done
	defer close(done)
	c.idleSet = time.Time{}
	err := c.rw.SetReadDeadline(time.Time{}) // before endWatch sets one
	c.mu.Unlock()
	n := 0
	if err == nil {
		n, err = c.rw.Read(c.buf[:cap(c.buf)])
		c.buf = c.buf[:n]
	}
	if n == 0 && errors.Is(err, io.EOF) && c.answer.halfClose {
		// It waits for its answer still; endWatch's deadline ends the watch.
		if err = hangup.Await(c.raw); errors.Is(err, errors.ErrUnsupported) {
			return
		}
	}
	if n > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		return
	}
	c.answer.clientGone.Store(true)
	c.cancel()
}

// endWatch ends the watch; it reports whether the client is still there.
func (c *conn) endWatch() bool {
	c.timer.Stop()
	c.mu.Lock()
	c.open = false
	done := c.watch
	c.watch = nil
	c.mu.Unlock()
	if done != nil {
		_ = c.rw.SetReadDeadline(time.Unix(1, 0)) // fails only on a closed connection, whose read ends as well
		<-done
	}
	return !c.answer.clientGone.Load()
}

// handed is a connection that net/http serves from here on.
type handed struct {
	net.Conn
	unread []byte
	state  *tls.ConnectionState // nil without TLS
}

// TLS returns the state of a connection's TLS that this package has handed to
// net/http, which does not see it; nil without.
func TLS(c net.Conn) *tls.ConnectionState {
	if h, ok := c.(*handed); ok {
		return h.state
	}
	return nil
}

func (h *handed) Read(b []byte) (int, error) {
	if len(h.unread) > 0 {
		n := copy(b, h.unread)
		if h.unread = h.unread[n:]; len(h.unread) == 0 {
			h.unread = nil
		}
		return n, nil
	}
	return h.Conn.Read(b)
}

// CloseWrite ends the direction to the client.
func (h *handed) CloseWrite() error {
	if half, ok := h.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return errors.ErrUnsupported
}

// NetConn returns what the connection is made of.
func (h *handed) NetConn() net.Conn { return h.Conn }

// SetLinger is that of the TCP connection.
func (h *handed) SetLinger(sec int) error {
	c := h.Conn
	if t, ok := c.(*tls.Conn); ok {
		c = t.NetConn()
	}
	if tcp, ok := c.(interface{ SetLinger(int) error }); ok {
		return tcp.SetLinger(sec)
	}
	return errors.ErrUnsupported
}

// SyscallConn gives the socket to those who wait for it. There is none while unread
// bytes are here, nor behind TLS.
func (h *handed) SyscallConn() (syscall.RawConn, error) {
	if sc, ok := h.Conn.(syscall.Conn); ok && len(h.unread) == 0 {
		return sc.SyscallConn()
	}
	return nil, errors.ErrUnsupported
}
