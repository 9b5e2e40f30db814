package proxy

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// maxResponseHeader is in bytes. What is kept of a header takes five times as much if
// it is made for that, and a sandbox may have thousands of answers under way.
const maxResponseHeader = 64 << 10

// pool keeps the HTTP/1.1 connections to one guest that wait for their next
// request. A request is written and its answer read by the goroutine that serves
// the client: no other one has to be woken up on the way, which is what a general
// HTTP client spends most of its time on.
type pool struct {
	dial    func(context.Context, netip.AddrPort) (*guestConn, error)
	maxIdle int           // to one port
	timeout time.Duration // after which an idle connection is closed

	mu    sync.Mutex
	idle  map[netip.AddrPort][]*upstream // the one used last is at the end
	timer *time.Timer                    // set while there are idle connections
}

func newPool(dial func(context.Context, netip.AddrPort) (*guestConn, error), maxIdle int, timeout time.Duration) *pool {
	return &pool{dial: dial, maxIdle: maxIdle, timeout: timeout, idle: make(map[netip.AddrPort][]*upstream)}
}

// get returns a connection to addr: one that is there, unless fresh is asked for.
func (p *pool) get(ctx context.Context, addr netip.AddrPort, fresh bool) (*upstream, error) {
	for !fresh {
		c := p.take(addr)
		if c == nil {
			break
		}
		if c.quiet() {
			c.reused = true
			return c, nil
		}
		c.close()
	}
	conn, err := p.dial(ctx, addr)
	if err != nil {
		return nil, err
	}
	return newUpstream(conn, addr), nil
}

func (p *pool) take(addr netip.AddrPort) *upstream {
	p.mu.Lock()
	defer p.mu.Unlock()
	conns := p.idle[addr]
	if len(conns) == 0 {
		return nil
	}
	c := conns[len(conns)-1]
	conns[len(conns)-1] = nil
	if conns = conns[:len(conns)-1]; len(conns) == 0 {
		delete(p.idle, addr)
	} else {
		p.idle[addr] = conns
	}
	return c
}

// put gives a connection back whose answer has been read to its end.
func (p *pool) put(c *upstream) {
	p.mu.Lock()
	conns := p.idle[c.addr]
	full := len(conns) >= p.maxIdle
	if !full {
		c.idleSince = time.Now()
		p.idle[c.addr] = append(conns, c)
		if p.timer == nil {
			p.timer = time.AfterFunc(p.timeout, p.reap)
		}
	}
	p.mu.Unlock()
	// One that Evict has closed meanwhile does no harm here: it is not quiet.
	if full {
		c.close()
	}
}

// reap closes what has been idle for too long.
func (p *pool) reap() {
	now := time.Now()
	var old []*upstream
	p.mu.Lock()
	next := time.Duration(-1)
	for addr, conns := range p.idle {
		n := 0
		for n < len(conns) && now.Sub(conns[n].idleSince) >= p.timeout {
			n++
		}
		old = append(old, conns[:n]...)
		if n == len(conns) {
			delete(p.idle, addr)
			continue
		}
		p.idle[addr] = append([]*upstream(nil), conns[n:]...)
		if wait := p.timeout - now.Sub(conns[n].idleSince); next < 0 || wait < next {
			next = wait
		}
	}
	if next >= 0 {
		p.timer.Reset(next)
	} else {
		p.timer = nil
	}
	p.mu.Unlock()
	for _, c := range old {
		c.close()
	}
}

// upstream is an HTTP/1.1 connection to a guest, used by one request at a time.
type upstream struct {
	*guestConn
	addr      netip.AddrPort
	br        *bufio.Reader
	bw        *bufio.Writer
	reused    bool // it has carried a request before
	idleSince time.Time

	budget      int64       // bytes that may still be read of a header; < 0: no limit
	received    bool        // something of the answer to the current request has come
	interrupted atomic.Bool // its request was given up

	raw    syscall.RawConn // nil where there is no socket
	peek   func(fd uintptr) bool
	poll   [1]unix.PollFd
	silent bool // what peek found
}

var (
	readers = sync.Pool{New: func() any { return bufio.NewReaderSize(nil, 4<<10) }}
	writers = sync.Pool{New: func() any { return bufio.NewWriterSize(nil, 4<<10) }}
)

func newUpstream(conn *guestConn, addr netip.AddrPort) *upstream {
	c := &upstream{guestConn: conn, addr: addr, budget: -1}
	c.br, c.bw = readers.Get().(*bufio.Reader), writers.Get().(*bufio.Writer)
	c.br.Reset(c)
	c.bw.Reset(conn)
	if sc, ok := conn.Conn.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			c.raw = raw
			c.peek = func(fd uintptr) bool {
				c.poll[0] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN | unix.POLLRDHUP}
				n, err := unix.Poll(c.poll[:], 0)
				c.silent = n == 0 && err == nil
				return true
			}
		}
	}
	return c
}

// quiet reports whether an idle connection is open and nothing has come on it: an
// application that has closed it, or sends what nobody asked for, gets no request.
func (c *upstream) quiet() bool {
	if c.br.Buffered() > 0 {
		return false
	}
	if c.raw == nil {
		return true
	}
	c.silent = false
	return c.raw.Read(c.peek) == nil && c.silent
}

var errHeaderTooLarge = fmt.Errorf("the header of the answer is larger than %d bytes", maxResponseHeader)

// Read reads from the guest, within what a header may have while one is read.
func (c *upstream) Read(b []byte) (int, error) {
	if c.budget >= 0 {
		if c.budget == 0 {
			return 0, errHeaderTooLarge
		}
		if int64(len(b)) > c.budget {
			b = b[:c.budget]
		}
	}
	n, err := c.Conn.Read(b)
	if n > 0 {
		c.received = true
		if c.budget >= 0 {
			c.budget -= int64(n)
		}
	}
	return n, err
}

// interrupt makes whatever waits for the guest return with an error.
func (c *upstream) interrupt() {
	c.interrupted.Store(true)
	_ = c.SetDeadline(time.Unix(1, 0)) // fails only on a connection that is closed
}

// close ends the connection. The buffers stay with it: a goroutine that is just
// being interrupted may hold them still.
func (c *upstream) close() { _ = c.Close() } // an error means that it was closed already

// releaseBuffers returns what has been read and not been used, and gives the
// buffers away: the connection is a bare one from then on.
func (c *upstream) releaseBuffers() []byte {
	early, _ := c.br.Peek(c.br.Buffered())
	early = append([]byte(nil), early...)
	c.br.Reset(nil)
	c.bw.Reset(io.Discard)
	readers.Put(c.br)
	writers.Put(c.bw)
	c.br, c.bw = nil, nil
	return early
}

// dialGuest connects to a guest's port. A refused connection is tried again
// twice: a port that was opened this moment may not be forwarded yet.
func (p *Proxy) dialGuest(ctx context.Context, g *guest, addr netip.AddrPort) (*guestConn, error) {
	for attempt := 1; ; attempt++ {
		if err := ctx.Err(); err != nil {
			return nil, err // an evicted sandbox's address may be another one's by now
		}
		conn, err := p.dial(ctx, "tcp", addr.String())
		if err == nil {
			return p.adopt(g, conn)
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
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
