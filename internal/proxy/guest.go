package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"sync"
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
	// HTTP/2 says properly when a connection ends, so nothing is lost with it.
	grpcIdleTimeout = 90 * time.Second
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
	user  *pool // to the ports of the user's applications
	agent *pool // to the guest agent's port

	grpcOnce sync.Once
	grpc     *http.Transport // to applications that speak gRPC; see Proxy.grpcTransport

	// Guarded by Proxy.mu:
	gone    bool // detached: nothing may be added any more
	streams map[*stream]struct{}
	users   int // streams to the user's applications among them
	conns   map[*guestConn]struct{}
}

func (p *Proxy) newGuest(id string) *guest {
	g := &guest{
		id:      id,
		streams: make(map[*stream]struct{}),
		conns:   make(map[*guestConn]struct{}),
	}
	dial := func(ctx context.Context, addr netip.AddrPort) (*guestConn, error) { return p.dialGuest(ctx, g, addr) }
	g.user = newPool(dial, userIdleConns, userIdleTimeout)
	g.agent = newPool(dial, agentIdleConns, agentIdleTimeout)
	return g
}

// pool picks the connections to a port.
func (g *guest) pool(port uint16) *pool {
	if port == AgentPort {
		return g.agent
	}
	return g.user
}

// grpcTransport is the way to a sandbox's applications that speak gRPC: HTTP/2
// with prior knowledge. Its connections are the sandbox's own, and the guest
// agent's port is never reached over one.
func (p *Proxy) grpcTransport(g *guest) *http.Transport {
	g.grpcOnce.Do(func() {
		var h2c http.Protocols
		h2c.SetUnencryptedHTTP2(true)
		g.grpc = &http.Transport{
			Proxy: nil, // the environment's proxy is for the internet, not for guests
			DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
				to, err := netip.ParseAddrPort(addr)
				if err != nil {
					return nil, err
				}
				return p.dialGuest(ctx, g, to)
			},
			Protocols:              &h2c,
			DisableCompression:     true, // what the client did not ask for it may not understand
			IdleConnTimeout:        grpcIdleTimeout,
			MaxResponseHeaderBytes: maxResponseHeader,
			HTTP2:                  &http.HTTP2Config{StrictMaxConcurrentRequests: false, SendPingTimeout: time.Minute},
		}
	})
	return g.grpc
}

// adopt enters a fresh connection into the guest's books, so that Evict can
// close it even when the other end has vanished without a word.
func (p *Proxy) adopt(g *guest, conn net.Conn) (*guestConn, error) {
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

// resetOnClose makes closing c a reset instead of a proper end.
func resetOnClose(c net.Conn) {
	if tcp, ok := c.(interface{ SetLinger(int) error }); ok {
		_ = tcp.SetLinger(0) // fails only on a connection that is closed
	}
}

// breakOff ends a connection with a reset, at once: TLS over it must not say that
// this is its proper end.
func breakOff(c io.Closer) {
	for {
		over, ok := c.(interface{ NetConn() net.Conn })
		if !ok {
			break
		}
		c = over.NetConn()
	}
	if conn, ok := c.(net.Conn); ok {
		resetOnClose(conn)
	}
	_ = c.Close() // an error means that it was closed already
}

// bufferPool lends the buffers that bodies are copied through.
type bufferPool struct{ pool sync.Pool }

const bufferSize = 64 << 10

func (b *bufferPool) Get() []byte {
	if buf, ok := b.pool.Get().(*[bufferSize]byte); ok {
		return buf[:]
	}
	return make([]byte, bufferSize)
}

func (b *bufferPool) Put(buf []byte) { b.pool.Put((*[bufferSize]byte)(buf)) }
