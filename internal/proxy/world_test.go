package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/server"
)

func TestMain(m *testing.M) {
	os.Setenv("HTTP_PROXY", "http://192.0.2.1:3128") // no guest may be reached through it
	goleak.VerifyTestMain(m)
}

const (
	idA = "aaaaaaaaaaaaaaaaaaaa"
	idB = "bbbbbbbbbbbbbbbbbbbb"
)

// sandboxes is a resolver with sandboxes on loopback addresses.
type sandboxes struct {
	mu    sync.Mutex
	addrs map[string]netip.Addr
	agent netip.AddrPort // of all of them; may be invalid
	rules map[string]proxy.Access
	err   error
}

func (s *sandboxes) Resolve(_ context.Context, id string) (proxy.Target, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err != nil {
		return proxy.Target{}, s.err
	}
	addr, ok := s.addrs[id]
	if !ok {
		return proxy.Target{}, sandbox.Errorf(sandbox.ErrNotFound, "sandbox %s not found", id)
	}
	return proxy.Target{SandboxID: id, Addr: addr, Agent: s.agent, Access: s.rules[id]}, nil
}

// rule says who may reach a sandbox. Without it everybody may.
func (s *sandboxes) rule(id string, a proxy.Access) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.rules == nil {
		s.rules = make(map[string]proxy.Access)
	}
	s.rules[id] = a
}

func (s *sandboxes) add(id, addr string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addrs[id] = netip.MustParseAddr(addr)
}

func (s *sandboxes) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *sandboxes) remove(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.addrs, id)
}

// world is a proxy before sandbox A (127.0.0.1), with clients for both HTTP versions.
type world struct {
	*sandboxes
	proxy *proxy.Proxy
	url   string // of the proxy
	addr  string // of the proxy
	http1 *http.Client
	http2 *http.Client // prior knowledge
}

func newWorld(t testing.TB) *world {
	t.Helper()
	return newWorldWith(t, proxy.Config{})
}

// newWorldWith sets what is not set of cfg.
func newWorldWith(t testing.TB, cfg proxy.Config) *world {
	t.Helper()
	w := &world{sandboxes: &sandboxes{addrs: map[string]netip.Addr{
		idA: netip.MustParseAddr("127.0.0.1"),
		idB: netip.MustParseAddr("127.0.0.2"),
	}}}
	cfg.Domain = "wrenn.test:8443"
	if cfg.Resolver == nil {
		cfg.Resolver = w.sandboxes
	}
	w.proxy = proxy.New(cfg)
	front := server.New(server.Config{Proxy: w.proxy, API: http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.proxy.ServeHTTP(rw, r) // what is for no sandbox is refused here
	})})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- front.Serve(ctx, server.Listeners{Plain: []net.Listener{ln}}) }()
	w.addr = ln.Addr().String()
	w.url = "http://" + w.addr

	w.http1 = &http.Client{Transport: &http.Transport{DisableCompression: true}}
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	w.http2 = &http.Client{Transport: &http.Transport{Protocols: &h2c, DisableCompression: true}}
	t.Cleanup(func() {
		w.http1.CloseIdleConnections()
		w.http2.CloseIdleConnections()
		front.Close()
		stop()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return w
}

// waitIdle waits until the proxy works on no request any more.
func (w *world) waitIdle(t testing.TB) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for w.proxy.OpenStreams() > 0 {
		if time.Now().After(deadline) {
			t.Fatal("a handler of the proxy is still running after 10 s")
		}
		time.Sleep(time.Millisecond) // between two looks
	}
}

// clients are the HTTP versions that a client may come with.
func (w *world) clients() map[string]*http.Client {
	return map[string]*http.Client{"HTTP/1.1": w.http1, "HTTP/2": w.http2}
}

// guest starts a server inside sandbox A and returns its port.
func guest(t testing.TB, h http.HandlerFunc) uint16 {
	t.Helper()
	return guestAt(t, "127.0.0.1:0", h)
}

func guestAt(t testing.TB, addr string, h http.HandlerFunc) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(h)
	srv.Listener.Close()
	srv.Listener = ln
	srv.Start()
	t.Cleanup(func() {
		srv.CloseClientConnections()
		srv.Close()
	})
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

// request makes a request for a port of a sandbox, by host.
func (w *world) request(t testing.TB, method, id string, port uint16, target string, body io.Reader) *http.Request {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, method, w.url+target, body)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = fmt.Sprintf("%d-%s.wrenn.test:8443", port, id)
	return req
}

// raw sends bytes to the proxy and returns what comes back until the proxy closes
// or the answer is complete.
func (w *world) raw(t testing.TB, request string) (*http.Response, string, error) {
	t.Helper()
	conn, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, "", err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	return res, string(body), err
}

func do(t testing.TB, c *http.Client, req *http.Request) (*http.Response, string) {
	t.Helper()
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return res, string(body)
}

func receive[T any](t testing.TB, c <-chan T) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(10 * time.Second):
		t.Fatal("nothing came within 10 s")
		panic("unreachable")
	}
}

func closedPort(t testing.TB) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}
