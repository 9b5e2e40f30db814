package proxy_test

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
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
	return proxy.Target{SandboxID: id, Addr: addr}, nil
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

	handlers sync.WaitGroup // of the proxy, running
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{sandboxes: &sandboxes{addrs: map[string]netip.Addr{
		idA: netip.MustParseAddr("127.0.0.1"),
		idB: netip.MustParseAddr("127.0.0.2"),
	}}}
	w.proxy = proxy.New(proxy.Config{Resolver: w.sandboxes, Domain: "wrenn.test:8443"})
	var protocols http.Protocols
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	front := httptest.NewUnstartedServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		w.handlers.Add(1)
		defer w.handlers.Done()
		w.proxy.ServeHTTP(rw, r)
	}))
	front.Config.Protocols = &protocols
	front.Start()
	w.url, w.addr = front.URL, front.Listener.Addr().String()

	w.http1 = &http.Client{Transport: &http.Transport{DisableCompression: true}}
	var h2c http.Protocols
	h2c.SetUnencryptedHTTP2(true)
	w.http2 = &http.Client{Transport: &http.Transport{Protocols: &h2c, DisableCompression: true}}
	t.Cleanup(func() {
		w.http1.CloseIdleConnections()
		w.http2.CloseIdleConnections()
		w.proxy.Close()
		front.CloseClientConnections()
		front.Close()
	})
	return w
}

// waitIdle waits until the proxy works on no request any more.
func (w *world) waitIdle(t testing.TB) {
	t.Helper()
	idle := make(chan struct{})
	go func() { w.handlers.Wait(); close(idle) }()
	select {
	case <-idle:
	case <-time.After(10 * time.Second):
		t.Fatal("a handler of the proxy is still running after 10 s")
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

func TestRequestArrivesAtTheGuestAsItWasSent(t *testing.T) {
	w := newWorld(t)
	seen := make(chan *http.Request, 1)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		seen <- r
		rw.Header()["Content-Type"] = nil
		rw.Header().Set("X-Answer", "yes")
		rw.WriteHeader(http.StatusTeapot)
		io.WriteString(rw, "<html>hello")
	})
	for name, client := range w.clients() {
		t.Run(name, func(t *testing.T) {
			req := w.request(t, "POST", idA, port, "/p", strings.NewReader("body"))
			req.Header.Set("X-Forwarded-For", "6.6.6.6")
			req.Header.Set("X-Forwarded-Proto", "https")
			req.Header.Set("Forwarded", "for=6.6.6.6")
			req.Header.Set("X-Real-Ip", "6.6.6.6")
			req.Header.Set("X-Access-Token", "t")
			req.Header["User-Agent"] = []string{""}
			res, body := do(t, client, req)
			if res.StatusCode != http.StatusTeapot || body != "<html>hello" || res.Header.Get("X-Answer") != "yes" {
				t.Errorf("answer = %s %q", res.Status, body)
			}
			if ct, ok := res.Header["Content-Type"]; ok {
				t.Errorf("a Content-Type was made up: %q", ct)
			}
			got := receive(t, seen)
			host := fmt.Sprintf("%d-%s.wrenn.test:8443", port, idA)
			if got.Host != host {
				t.Errorf("Host = %q, want %q", got.Host, host)
			}
			want := map[string]string{
				"X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "http", "X-Forwarded-Host": host,
				"X-Real-Ip": "", "Forwarded": "", "X-Access-Token": "t", "User-Agent": "", "Accept-Encoding": "",
			}
			for k, v := range want {
				if got.Header.Get(k) != v {
					t.Errorf("%s = %q, want %q", k, got.Header.Get(k), v)
				}
			}
			if got.ProtoMajor != 1 {
				t.Errorf("guest was spoken to in %s", got.Proto)
			}
		})
	}
}

func TestTargetArrivesByteForByte(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) { io.WriteString(rw, r.RequestURI) })
	for _, target := range []string{
		"/", "/a/", "/a//b", "//a", "//a//b/", "///", "/a/../b", "/./a", "/..", "/a%2Fb", "/a%2fb", "/%41",
		"/a;b=c", "/a?", "/?", "/a??", "/a?x=1;y=2", "/a?x=%zz", "/a?%", "/a?b=c&&=&", "/a?q=a+b%20c", "/a'b(c)*!$&,=:@",
		`/a"b<c>^{|}`, "/é", "/a?é=\"", "/a#b", "//a?;", "//a%2F%2f", "/:80", "/http://other.test/x", "/a?u=http://x/",
		"//other.test:80/x", "/@x", "/a|b?c|d",
	} {
		req := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\n\r\n", target, port, idA)
		_, body, err := w.raw(t, req)
		if err != nil {
			t.Errorf("%s: %v", target, err)
		} else if body != target {
			t.Errorf("target %q arrived as %q", target, body)
		}
	}
	t.Run("absolute form becomes origin form", func(t *testing.T) {
		for sent, want := range map[string]string{"": "/", "/": "/", "/a//b?": "/a//b?", "?q": "/?q", "//x": "//x"} {
			req := fmt.Sprintf("GET http://%d-%s.wrenn.test%s HTTP/1.1\r\nHost: elsewhere\r\n\r\n", port, idA, sent)
			if _, body, err := w.raw(t, req); err != nil || body != want {
				t.Errorf("%q arrived as %q (%v), want %q", sent, body, err, want)
			}
		}
	})
	t.Run("OPTIONS asterisk", func(t *testing.T) {
		req := fmt.Sprintf("OPTIONS * HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\n\r\n", port, idA)
		if res, _, err := w.raw(t, req); err != nil || res.StatusCode != 200 {
			t.Errorf("answer = %v, %v", res, err)
		}
	})
}

func TestFailuresHaveTheShapesThatClientsKnow(t *testing.T) {
	w := newWorld(t)
	closed := closedPort(t)
	rude := func() uint16 { // accepts and hangs up
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				c.Close()
			}
		}()
		return uint16(ln.Addr().(*net.TCPAddr).Port)
	}()
	unknown := "cccccccccccccccccccc"
	tests := map[string]struct {
		id      string
		port    uint16
		target  string
		resolve error
		status  int
		body    map[string]any
	}{
		"unknown sandbox": {
			id: unknown, port: 80, status: 502,
			body: map[string]any{"sandboxId": unknown, "message": "The sandbox was not found", "code": 502.0},
		},
		"id of another length": {
			id: "abc", port: 80, status: 502,
			body: map[string]any{"sandboxId": "abc", "message": "The sandbox was not found", "code": 502.0},
		},
		"closed port": {
			id: idA, port: closed, status: 502,
			body: map[string]any{"sandboxId": idA, "message": "The sandbox is running but port is not open", "port": float64(closed), "code": 502.0},
		},
		"application that hangs up": {
			id: idA, port: rude, status: 502,
			body: map[string]any{"sandboxId": idA, "message": "The application in the sandbox did not answer properly", "port": float64(rude), "code": 502.0},
		},
		"sandbox in transition": {
			id: idA, port: 80, status: 503, resolve: sandbox.Errorf(sandbox.ErrConflict, "sandbox is being paused"),
			body: map[string]any{"sandboxId": idA, "message": "sandbox is being paused", "code": 503.0},
		},
		"broken resolver": {
			id: idA, port: 80, status: 500, resolve: errors.New("disk full: /secret/path"),
			body: map[string]any{"sandboxId": idA, "message": "The sandbox could not be looked up", "code": 500.0},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			w.sandboxes.fail(tt.resolve)
			defer w.sandboxes.fail(nil)
			res, body := do(t, w.http1, w.request(t, "GET", tt.id, tt.port, "/health", nil))
			if res.StatusCode != tt.status || res.Header.Get("Content-Type") != "application/json; charset=utf-8" {
				t.Errorf("answer = %s, %s", res.Status, res.Header.Get("Content-Type"))
			}
			var got map[string]any
			if err := json.Unmarshal([]byte(body), &got); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.body, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func TestPeopleGetAPageAndProgramsGetJSON(t *testing.T) {
	w := newWorld(t)
	port := closedPort(t)
	const firefox = "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"
	for name, tt := range map[string]struct {
		header map[string]string
		page   bool
	}{
		"navigation":                  {map[string]string{"User-Agent": firefox, "Accept": "text/html,*/*", "Sec-Fetch-Mode": "navigate"}, true},
		"old browser":                 {map[string]string{"User-Agent": firefox}, true},
		"fetch in a page":             {map[string]string{"User-Agent": firefox, "Accept": "*/*", "Sec-Fetch-Mode": "cors"}, false},
		"XMLHttpRequest":              {map[string]string{"User-Agent": firefox, "X-Requested-With": "XMLHttpRequest"}, false},
		"browser that asks for JSON":  {map[string]string{"User-Agent": firefox, "Accept": "application/json"}, false},
		"node":                        {map[string]string{"User-Agent": "node"}, false},
		"client without a User-Agent": {map[string]string{"User-Agent": ""}, false},
	} {
		t.Run(name, func(t *testing.T) {
			req := w.request(t, "GET", idA, port, "/", nil)
			for k, v := range tt.header {
				req.Header.Set(k, v)
			}
			res, body := do(t, w.http1, req)
			isPage := strings.HasPrefix(body, "<html") && strings.HasSuffix(strings.TrimSpace(body), "</html>") &&
				strings.Contains(body, idA) && strings.Contains(body, strconv.Itoa(int(port))) &&
				res.Header.Get("Content-Type") == "text/html; charset=utf-8"
			if res.StatusCode != 502 || isPage != tt.page || json.Valid([]byte(body)) == tt.page {
				t.Errorf("page = %v, want %v: %s %s", isPage, tt.page, res.Status, body)
			}
		})
	}
}

func TestPortThatOpensAMomentLaterIsReached(t *testing.T) {
	w := newWorld(t)
	port := closedPort(t)
	dials := 0
	p := proxy.New(proxy.Config{
		Resolver: w.sandboxes, Domain: "wrenn.test",
		Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
			dials++
			if dials == 3 { // the application comes up between the second and the third try
				guestAt(t, addr, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "up") })
			}
			return (&net.Dialer{}).DialContext(ctx, network, addr)
		},
	})
	defer p.Close()
	rec := httptest.NewRecorder()
	p.ServeHTTP(rec, httptest.NewRequest("GET", fmt.Sprintf("http://%d-%s.wrenn.test/", port, idA), nil))
	if rec.Code != 200 || rec.Body.String() != "up" || dials != 3 {
		t.Errorf("answer = %d %q after %d dials", rec.Code, rec.Body, dials)
	}
}

func TestDialIsGivenUpWithinHalfASecond(t *testing.T) {
	w := newWorld(t)
	port := closedPort(t)
	start := time.Now()
	res, _ := do(t, w.http1, w.request(t, "GET", idA, port, "/", nil))
	if took := time.Since(start); res.StatusCode != 502 || took > 500*time.Millisecond || took < 150*time.Millisecond {
		t.Errorf("answer = %s after %s; want 502 after the two waits of 50 and 100 ms", res.Status, took)
	}
}

func TestSandboxesDoNotMeet(t *testing.T) {
	w := newWorld(t)
	port := guestAt(t, "127.0.0.1:0", func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "A") })
	guestAt(t, fmt.Sprintf("127.0.0.2:%d", port), func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "B") })
	for id, want := range map[string]string{idA: "A", idB: "B"} {
		if _, body := do(t, w.http1, w.request(t, "GET", id, port, "/", nil)); body != want {
			t.Errorf("sandbox %s answered %q", id, body)
		}
	}
}

func TestEnvironmentProxyIsNotUsed(t *testing.T) {
	dialled := make(chan string, 1)
	p := proxy.New(proxy.Config{
		Resolver: &sandboxes{addrs: map[string]netip.Addr{idA: netip.MustParseAddr("10.11.0.5")}},
		Domain:   "wrenn.test",
		Dial: func(_ context.Context, _, addr string) (net.Conn, error) {
			dialled <- addr
			return nil, errors.New("no network here")
		},
	})
	defer p.Close()
	p.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "http://80-"+idA+".wrenn.test/", nil))
	if addr := receive(t, dialled); addr != "10.11.0.5:80" {
		t.Errorf("dialled %s, want the guest itself (HTTP_PROXY is set to %s)", addr, os.Getenv("HTTP_PROXY"))
	}
}
