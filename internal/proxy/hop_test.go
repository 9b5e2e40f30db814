package proxy_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/server"
)

// behindAgent puts the data plane of a host agent between the proxy and sandbox A.
func (w *world) behindAgent(t testing.TB) *proxy.Proxy {
	t.Helper()
	hop := proxy.New(proxy.Config{Resolver: &sandboxes{addrs: map[string]netip.Addr{idA: netip.MustParseAddr("127.0.0.1")}}, Hop: true})
	front := server.New(server.Config{Proxy: hop, API: http.NotFoundHandler()})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- front.Serve(ctx, server.Listeners{Plain: []net.Listener{ln}}) }()
	t.Cleanup(func() {
		front.Close()
		stop()
		<-served
	})
	w.sandboxes.mu.Lock()
	defer w.sandboxes.mu.Unlock()
	w.sandboxes.agent = ln.Addr().(*net.TCPAddr).AddrPort()
	return hop
}

func TestTwoHopsAreLikeOne(t *testing.T) {
	w := newWorld(t)
	w.behindAgent(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Location", "/next//x?")
		rw.Header().Add("Set-Cookie", "a=b; Path=/sub")
		rw.Header().Set("X-Seen", fmt.Sprintf("%s %s %s for=%s host=%s proto=%s prefix=%s", r.Method, r.RequestURI, r.Host,
			r.Header.Get("X-Forwarded-For"), r.Header.Get("X-Forwarded-Host"), r.Header.Get("X-Forwarded-Proto"), r.Header.Get("X-Forwarded-Prefix")))
		rw.WriteHeader(http.StatusFound)
		io.Copy(rw, r.Body)
	})
	host := fmt.Sprintf("%d-%s.wrenn.test:8443", port, idA)
	prefix := fmt.Sprintf("/proxy/%s/%d", idA, port)
	noRedirects := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	for name, client := range w.clients() {
		client.CheckRedirect = noRedirects
		t.Run("host form over "+name, func(t *testing.T) {
			req := w.request(t, "POST", idA, port, "/a//b%2Fc/?", strings.NewReader("body"))
			req.Header.Set("X-Forwarded-For", "6.6.6.6")
			req.Header.Set("X-Forwarded-Prefix", "/evil")
			res, body := do(t, client, req)
			want := fmt.Sprintf("POST /a//b%%2Fc/? %s for=127.0.0.1 host=%s proto=http prefix=", host, host)
			if got := res.Header.Get("X-Seen"); got != want {
				t.Errorf("guest saw\n%s\nwant\n%s", got, want)
			}
			if res.Header.Get("Location") != "/next//x?" || res.Header.Get("Set-Cookie") != "a=b; Path=/sub" || body != "body" {
				t.Errorf("answer = %v %q", res.Header, body)
			}
		})
		t.Run("path form over "+name, func(t *testing.T) {
			req := w.request(t, "GET", idA, port, prefix+"/a", nil)
			req.Host = "127.0.0.1"
			res, _ := do(t, client, req)
			want := "GET /a 127.0.0.1 for=127.0.0.1 host=127.0.0.1 proto=http prefix=" + prefix
			if got := res.Header.Get("X-Seen"); got != want {
				t.Errorf("guest saw\n%s\nwant\n%s", got, want)
			}
			if res.Header.Get("Location") != prefix+"/next//x?" || res.Header.Get("Set-Cookie") != "a=b; Path="+prefix+"/sub" {
				t.Errorf("answer = %v", res.Header)
			}
		})
	}
}

func TestWebSocketsAndFailuresPassTwoHops(t *testing.T) {
	w := newWorld(t)
	hop := w.behindAgent(t)
	conn := w.websocket(t, guest(t, websocketEcho))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := conn.Write(ctx, websocket.MessageText, []byte("hi")); err != nil {
		t.Fatal(err)
	}
	if _, got, err := conn.Read(ctx); err != nil || string(got) != "hi" {
		t.Fatalf("echo = %q, %v", got, err)
	}
	closed := closedPort(t)
	if res, body := do(t, w.http1, w.request(t, "GET", idA, closed, "/", nil)); res.StatusCode != 502 || !strings.Contains(body, "port is not open") {
		t.Errorf("closed port: %s %s", res.Status, body)
	}
	hop.Evict(idA)
	if _, _, err := conn.Read(ctx); err == nil || ctx.Err() != nil {
		t.Errorf("after the agent let go of the sandbox: %v", err)
	}
}

func TestHostThatCannotBeReachedIsPassingTrouble(t *testing.T) {
	w := newWorld(t)
	w.sandboxes.agent = netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), closedPort(t))
	res, body := do(t, w.http1, w.request(t, "GET", idA, 80, "/", nil))
	if res.StatusCode != 503 || !strings.Contains(body, "host of the sandbox cannot be reached") {
		t.Errorf("answer = %s %s", res.Status, body)
	}
}

func TestHostAgentServesNothingButThePathForm(t *testing.T) {
	p := proxy.New(proxy.Config{Resolver: &sandboxes{}, Hop: true})
	for _, target := range []string{"/", "/proxy/", "/proxy/" + idA, "/proxy/" + idA + "/x/", "/x/proxy/" + idA + "/80/"} {
		r, err := http.NewRequest("GET", "http://80-"+idA+".wrenn.test"+target, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.RequestURI = target
		if d, ok, err := p.Route(r); err == nil {
			t.Errorf("%s: %v %v", target, d, ok)
		}
	}
}
