package proxy

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"sync"
	"syscall"
	"time"
)

const (
	dialTimeout  = 5 * time.Second
	dialAttempts = 3
	dialBackoff  = 50 * time.Millisecond // times the number of the attempt

	// Many application servers close idle connections after a few seconds (2 s
	// at the least), and a request that is just being sent then is lost. So the
	// proxy lets go first.
	userIdleTimeout = 1500 * time.Millisecond
	userIdleConns   = 32
	// The guest agent is ours and keeps idle connections far longer.
	agentIdleTimeout = 90 * time.Second
	agentIdleConns   = 64

	maxResponseHeader = 1 << 20 // bytes
)

var errEvicted = errors.New("sandbox is gone")

// dialError is a failure to reach a guest's port.
type dialError struct{ err error }

func (e *dialError) Error() string { return e.err.Error() }
func (e *dialError) Unwrap() error { return e.err }

// guest is all that the proxy holds of one sandbox. It exists from the first
// request on, as long as there is a stream or a connection.
type guest struct {
	id    string
	user  *httputil.ReverseProxy // to the ports of the user's applications
	agent *httputil.ReverseProxy // to the guest agent's port

	// Guarded by Proxy.mu:
	gone    bool // detached: nothing may be added any more
	streams map[*stream]struct{}
	conns   map[*guestConn]struct{}
}

func (p *Proxy) newGuest(id string) *guest {
	g := &guest{
		id:      id,
		streams: make(map[*stream]struct{}),
		conns:   make(map[*guestConn]struct{}),
	}
	g.user = p.newReverseProxy(p.newPool(g, userIdleConns, userIdleTimeout))
	g.agent = p.newReverseProxy(p.newPool(g, agentIdleConns, agentIdleTimeout))
	return g
}

// route picks the way to a port.
func (g *guest) route(port uint16) *httputil.ReverseProxy {
	if port == AgentPort {
		return g.agent
	}
	return g.user
}

func (p *Proxy) newPool(g *guest, idleConns int, idle time.Duration) *http.Transport {
	var http1 http.Protocols
	http1.SetHTTP1(true)
	return &http.Transport{
		Proxy: nil, // the environment's proxy is for the internet, not for guests
		DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return p.dialGuest(ctx, g, network, addr)
		},
		Protocols:              &http1,
		DisableCompression:     true, // what the client did not ask for it may not understand
		MaxIdleConnsPerHost:    idleConns,
		IdleConnTimeout:        idle,
		ExpectContinueTimeout:  time.Second,
		MaxResponseHeaderBytes: maxResponseHeader,
	}
}

// dialGuest connects to a guest's port. A refused connection is tried again
// twice: a port that was opened this moment may not be forwarded yet.
func (p *Proxy) dialGuest(ctx context.Context, g *guest, network, addr string) (net.Conn, error) {
	for attempt := 1; ; attempt++ {
		conn, err := p.dial(ctx, network, addr)
		if err == nil {
			return p.adopt(g, conn)
		}
		if attempt == dialAttempts || !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, &dialError{err}
		}
		wait := time.NewTimer(time.Duration(attempt) * dialBackoff)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return nil, ctx.Err()
		}
	}
}

// adopt enters a fresh connection into the guest's books, so that Evict can
// close it even when the other end has vanished without a word.
func (p *Proxy) adopt(g *guest, conn net.Conn) (net.Conn, error) {
	c := &guestConn{Conn: conn}
	c.release = func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		delete(g.conns, c)
		p.drop(g)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if g.gone {
		resetOnClose(conn)
		_ = conn.Close()
		return nil, errEvicted
	}
	g.conns[c] = struct{}{}
	return c, nil
}

// drop forgets a guest that holds nothing any more. Called with p.mu held.
func (p *Proxy) drop(g *guest) {
	if !g.gone && len(g.streams) == 0 && len(g.conns) == 0 {
		g.gone = true
		delete(p.guests, g.id)
	}
}

// detach takes a guest out of the books and returns what it held. Called with
// p.mu held.
func (p *Proxy) detach(g *guest) ([]*stream, []*guestConn) {
	g.gone = true
	delete(p.guests, g.id)
	streams := make([]*stream, 0, len(g.streams))
	for s := range g.streams {
		streams = append(streams, s)
	}
	conns := make([]*guestConn, 0, len(g.conns))
	for c := range g.conns {
		conns = append(conns, c)
	}
	return streams, conns
}

// breakOff ends what detach returned. The connections go with a reset, so that
// the kernel keeps no state of an address which another sandbox may get; whoever
// closes them first. They come after the streams, which must know that they are
// aborted before their connections fail under them.
func (g *guest) breakOff(streams []*stream, conns []*guestConn) {
	for _, c := range conns {
		resetOnClose(c.Conn)
	}
	for _, s := range streams {
		s.abort()
	}
	for _, c := range conns {
		_ = c.Close() // an error means that it was closed already
	}
}

// guestConn is a connection to a guest that reports its end.
type guestConn struct {
	net.Conn
	once    sync.Once
	release func()
}

func (c *guestConn) Close() error {
	c.once.Do(c.release)
	return c.Conn.Close()
}

// CloseWrite passes a half-close on: upgraded protocols may need it.
func (c *guestConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return nil
}

// resetOnClose makes closing c a reset instead of a proper end.
func resetOnClose(c net.Conn) {
	if tcp, ok := c.(interface{ SetLinger(int) error }); ok {
		_ = tcp.SetLinger(0) // fails only on a connection that is closed
	}
}

// bufferPool lends the buffers that bodies are copied through.
type bufferPool struct{ pool sync.Pool }

const bufferSize = 32 << 10

func (b *bufferPool) Get() []byte {
	if buf, ok := b.pool.Get().(*[bufferSize]byte); ok {
		return buf[:]
	}
	return make([]byte, bufferSize)
}

func (b *bufferPool) Put(buf []byte) { b.pool.Put((*[bufferSize]byte)(buf)) }

func (p *Proxy) newReverseProxy(pool *http.Transport) *httputil.ReverseProxy {
	return &httputil.ReverseProxy{
		Transport:      pool,
		Rewrite:        rewrite,
		ModifyResponse: rewriteAnswer,
		FlushInterval:  -1, // every piece goes out as it comes
		BufferPool:     &p.buffers,
		ErrorHandler:   p.failForward,
		// Broken bodies are daily business between clients and applications.
		ErrorLog: slog.NewLogLogger(p.log.Handler(), slog.LevelDebug),
	}
}
