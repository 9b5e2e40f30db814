// Package http1 serves the plainest and most frequent of HTTP/1 requests, those
// without a body, from the one goroutine that owns their connection, and hands
// every other connection to net/http, with what has been read of it.
//
// net/http starts a goroutine for each request that watches the client, and stops it
// again: on a request that takes some ten microseconds that is most of the time.
// Here a client is watched from the moment on at which the answer is late. What is
// not exactly as the grammar wants it is not judged here: it is net/http's.
package http1

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Config is what a Server needs.
type Config struct {
	// Take returns who serves a request, or nil if net/http is to have it and its
	// connection. A handler must not expect the request's context to end before the
	// connection does, nor to take the connection over.
	Take func(*http.Request) http.Handler

	HeaderTimeout time.Duration // from the first byte of a header to its last, and for a handshake
	IdleTimeout   time.Duration // between two requests; may be up to a sixtieth shorter
	Log           *slog.Logger
}

// Server accepts connections. It is a net.Listener of those that it does not serve
// itself. Close ends it.
type Server struct {
	cfg    Config
	handed chan net.Conn

	ctx    context.Context // of the connections
	cancel context.CancelFunc
	wg     sync.WaitGroup // of the goroutines that serve connections

	mu        sync.Mutex
	closing   bool // no new connections, no further requests
	conns     map[*conn]bool
	listeners []net.Listener
	closed    chan struct{}
	drained   chan struct{} // closed when there are no connections while closing
	announce  bool          // drained has been closed
}

// New returns a server.
func New(cfg Config) *Server {
	s := &Server{
		cfg: cfg, handed: make(chan net.Conn), conns: make(map[*conn]bool),
		closed: make(chan struct{}), drained: make(chan struct{}),
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Serve accepts connections until the listener fails or the server is closed, over
// TLS where there is a configuration. Protocols are offered as it says; HTTP/2 is
// net/http's. It closes the listener.
func (s *Server) Serve(l net.Listener, config *tls.Config) error {
	defer l.Close()
	s.mu.Lock()
	s.listeners = append(s.listeners, l)
	closing := s.closing
	s.mu.Unlock()
	if closing {
		return net.ErrClosed
	}
	const longest = time.Second
	wait := time.Duration(0)
	for {
		raw, err := l.Accept()
		select {
		case <-s.closed:
			if err == nil {
				raw.Close()
			}
			return net.ErrClosed
		default:
		}
		if err != nil {
			var passing interface{ Temporary() bool }
			if !errors.As(err, &passing) || !passing.Temporary() {
				return err
			}
			// Out of descriptors, mostly: others will be closed.
			wait = min(max(2*wait, 5*time.Millisecond), longest)
			s.cfg.Log.Warn("accept connection", "error", err, "retry_in", wait)
			select {
			case <-time.After(wait):
			case <-s.closed:
			}
			continue
		}
		wait = 0
		s.start(raw, config)
	}
}

// start serves a connection in a goroutine of its own.
func (s *Server) start(raw net.Conn, config *tls.Config) {
	c := &conn{server: s, raw: raw, rw: raw}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		raw.Close()
		return
	}
	s.conns[c] = true
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		c.serve(config)
	}()
}

// forget takes a connection out of the books.
func (s *Server) forget(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	s.checkDrained()
}

// checkDrained is called with s.mu held.
func (s *Server) checkDrained() {
	if s.closing && len(s.conns) == 0 && !s.announce {
		s.announce = true
		close(s.drained)
	}
}

// hand gives a connection to net/http.
func (s *Server) hand(c net.Conn) {
	select {
	case s.handed <- c:
	case <-s.closed:
		c.Close()
	}
}

// Accept implements net.Listener.
func (s *Server) Accept() (net.Conn, error) {
	select {
	case c := <-s.handed:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener: an address that it listens on.
func (s *Server) Addr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.listeners) == 0 {
		return &net.TCPAddr{}
	}
	return s.listeners[0].Addr()
}

// Close ends the listeners and the connections that wait for a request. Those with a
// request go on, see Shutdown. It implements net.Listener.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return nil
	}
	s.closing = true
	close(s.closed)
	for _, l := range s.listeners {
		l.Close()
	}
	for c := range s.conns {
		if !c.busy.Load() {
			c.raw.Close() // not c.rw: TLS would take its time to say goodbye
		}
	}
	s.checkDrained()
	return nil
}

// Shutdown closes the server and waits until the requests under way are answered;
// when ctx ends first, it breaks them off. It returns when every goroutine of the
// server has ended, and then ctx's error if it had to break something off.
func (s *Server) Shutdown(ctx context.Context) error {
	_ = s.Close() // returns no error
	var err error
	select {
	case <-s.drained:
	case <-ctx.Done():
		err = ctx.Err()
	}
	s.cancel()
	s.mu.Lock()
	for c := range s.conns {
		c.raw.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
	return err
}
