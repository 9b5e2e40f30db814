package bench

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/server"
)

const (
	idleGoal = 40 // KiB of platform memory for each
	// idleSettle is how long the proxy is left alone before it is looked at.
	idleSettle = 5 * time.Second
	// perSandbox keeps below what one sandbox may have open at once.
	perSandbox = 4000
)

// idleWebSocket is one that the benchmark holds.
type idleWebSocket interface {
	io.ReadWriteCloser
	SetDeadline(time.Time) error
}

// measureIdle opens WebSockets through the proxy, leaves them alone, and looks at
// its memory: nine tenths over HTTP/1.1, with a connection for each, and the rest
// over HTTP/2, where many share one.
func (b *proxyBench) measureIdle(ctx context.Context) error {
	overHTTP2 := b.Idle / 10
	plain := b.Idle - overHTTP2
	need := uint64(plain + b.Idle + 500)
	if limit, err := server.RaiseFileLimit(); err != nil || limit < need {
		return errors.Join(fmt.Errorf("%d WebSockets need %d open files here, and %d are allowed: run it where more are, or ask for fewer with --idle", b.Idle, need, limit), err)
	}
	guest, err := startEchoGuest(ctx)
	if err != nil {
		return err
	}
	defer guest.wg.Wait() // after the connections have been closed
	defer guest.close()
	_, port, err := net.SplitHostPort(guest.l.Addr().String())
	if err != nil {
		return err
	}
	host := func(i int) string { return port + "-" + benchSandbox(i/perSandbox) + "." + benchDomain }
	held := make([]idleWebSocket, b.Idle)
	defer func() {
		for _, c := range held {
			if c != nil {
				c.Close()
			}
		}
	}()
	client := newExtendedConnect(b.proxy.address)
	defer client.close()
	for _, part := range []struct {
		name        string
		first, last int
		open        func(i int) (idleWebSocket, error)
	}{
		{"HTTP/1.1", 0, plain, func(i int) (idleWebSocket, error) { return openWebSocket(ctx, b.proxy.address, host(i)) }},
		{"HTTP/2", plain, b.Idle, func(i int) (idleWebSocket, error) { return client.open(ctx, host(i)) }},
	} {
		if part.first == part.last {
			continue
		}
		if err := b.hold(ctx, part.name, held, part.first, part.last, part.open); err != nil {
			return fmt.Errorf("over %s: %w", part.name, err)
		}
	}
	// They have to be alive, or it is not them that has been measured.
	for i, c := range held {
		if err := echoOnce(c); err != nil {
			return fmt.Errorf("WebSocket %d is not alive: %w", i, err)
		}
	}
	b.results = append(b.results, single("idle WebSockets held at once", "", float64(len(held))).
		noted("each echoed a byte after all had been opened"))
	return nil
}

// hold opens held[first:last] and measures what they cost.
func (b *proxyBench) hold(ctx context.Context, name string, held []idleWebSocket, first, last int, open func(int) (idleWebSocket, error)) error {
	before, err := b.proxy.rss()
	if err != nil {
		return err
	}
	begin := time.Now()
	var g errgroup.Group
	g.SetLimit(32)
	for i := first; i < last; i++ {
		g.Go(func() error {
			c, err := open(i)
			if err == nil {
				held[i] = c
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	opened := time.Since(begin)
	select {
	case <-time.After(idleSettle):
	case <-ctx.Done():
		return ctx.Err()
	}
	after, err := b.proxy.rss()
	if err != nil {
		return err
	}
	each := float64(after-before) / 1024 / float64(last-first)
	b.results = append(b.results, single("memory of an idle WebSocket over "+name, "KiB", each).want(fmt.Sprintf("≤ %d", idleGoal), each <= idleGoal).
		noted("%d opened in %.1f s; the proxy's RSS went from %.1f to %.1f MiB", last-first, opened.Seconds(), mib(before), mib(after)))
	return nil
}

// rss is the proxy's memory in bytes.
func (p *servedProxy) rss() (int64, error) {
	text, err := os.ReadFile("/proc/" + strconv.Itoa(p.cmd.Process.Pid) + "/status")
	if err != nil {
		return 0, err
	}
	return kib(text, "VmRSS:")
}

// openWebSocket opens a connection to the echoing guest. What goes over it
// afterwards is no WebSocket's frames: a proxy does not look at them.
func openWebSocket(ctx context.Context, address, host string) (net.Conn, error) {
	c, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	if err = errors.Join(c.SetDeadline(time.Now().Add(30*time.Second)), upgradeClient(c, host)); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

func upgradeClient(c net.Conn, host string) error {
	_, err := fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", host)
	if err != nil {
		return err
	}
	r := bufio.NewReaderSize(c, 1<<10)
	line, err := r.ReadString('\n')
	if err != nil || line != "HTTP/1.1 101 Switching Protocols\r\n" {
		return fmt.Errorf("no WebSocket: %q, %w", line, err)
	}
	for line != "\r\n" {
		if line, err = r.ReadString('\n'); err != nil {
			return err
		}
	}
	return c.SetDeadline(time.Time{})
}

func echoOnce(c idleWebSocket) error {
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return err
	}
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}

// echoGuest agrees to every upgrade, and sends back what comes then.
type echoGuest struct {
	l  net.Listener
	wg sync.WaitGroup
}

func startEchoGuest(ctx context.Context) (*echoGuest, error) {
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	g := &echoGuest{l: l}
	g.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			g.wg.Go(func() { echoUpgraded(c) })
		}
	})
	return g, nil
}

// close ends the guest. Its connections end with their other ends.
func (g *echoGuest) close() { g.l.Close() }

func echoUpgraded(c net.Conn) {
	defer c.Close()
	r := bufio.NewReaderSize(c, 1<<10)
	for line := ""; line != "\r\n"; {
		var err error
		if line, err = r.ReadString('\n'); err != nil {
			return
		}
	}
	if _, err := io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"); err != nil {
		return
	}
	buf := make([]byte, 64)
	for {
		n, err := c.Read(buf)
		if err != nil {
			return
		}
		if _, err := c.Write(buf[:n]); err != nil {
			return
		}
	}
}

// extendedConnect opens WebSockets over one connection of HTTP/2 (RFC 8441).
//
//nolint:staticcheck // net/http's own client lets no pseudo-header through
type extendedConnect struct{ pool *http2.Transport }

//nolint:staticcheck // as above
func newExtendedConnect(address string) extendedConnect {
	return extendedConnect{&http2.Transport{
		AllowHTTP: true, // there is no TLS here
		DialTLSContext: func(ctx context.Context, network, _ string, _ *tls.Config) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, address)
		},
	}}
}

//nolint:staticcheck // as above
func (e extendedConnect) close() { e.pool.CloseIdleConnections() }

//nolint:staticcheck,bodyclose // as above; the body is what is returned
func (e extendedConnect) open(ctx context.Context, host string) (idleWebSocket, error) {
	body, upload := io.Pipe()
	r, err := http.NewRequestWithContext(ctx, http.MethodConnect, "http://"+host+"/", body)
	if err != nil {
		return nil, err
	}
	r.Header[":protocol"] = []string{"websocket"}
	res, err := e.pool.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	s := &http2Stream{WriteCloser: upload, body: res.Body}
	if res.StatusCode != http.StatusOK {
		s.Close()
		return nil, fmt.Errorf("no WebSocket: %s", res.Status)
	}
	return s, nil
}

// http2Stream is both directions of a stream.
type http2Stream struct {
	io.WriteCloser
	body io.ReadCloser
}

func (s *http2Stream) Read(p []byte) (int, error) { return s.body.Read(p) }

func (s *http2Stream) Close() error { return errors.Join(s.WriteCloser.Close(), s.body.Close()) }

// SetDeadline has no effect: a stream of HTTP/2 has none on this side.
func (*http2Stream) SetDeadline(time.Time) error { return nil }
