package proxy_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/proxy"
)

func TestRoute(t *testing.T) {
	const domain = "Wrenn.test:8443"
	long := strings.Repeat("a", 64)
	type headers = map[string][]string
	routing := func(id, port string) headers {
		return headers{proxy.HeaderSandboxID: {id}, proxy.HeaderSandboxPort: {port}}
	}
	tests := []struct {
		name    string
		domain  string
		host    string
		headers headers
		want    string // "port id", "" for the API, "400 …" with a part of the text
	}{
		{"host form", domain, "8000-" + idA + ".wrenn.test", nil, "8000 " + idA},
		{"port of the host does not matter", domain, "8000-" + idA + ".wrenn.test:1234", nil, "8000 " + idA},
		{"letter case does not matter", domain, "8000-" + strings.ToUpper(idA) + ".WRENN.test", nil, "8000 " + idA},
		{"dot of the root", domain, "8000-" + idA + ".wrenn.test.", nil, "8000 " + idA},
		{"old client id", domain, "8000-" + idA + "-00000000.wrenn.test", nil, "8000 " + idA},
		{"host beats headers", domain, "8000-" + idA + ".wrenn.test", routing(idB, "1"), "8000 " + idA},
		{"highest port", domain, "65535-" + idA + ".wrenn.test", nil, "65535 " + idA},
		{"port too high", domain, "65536-" + idA + ".wrenn.test", nil, "400 port"},
		{"port 0", domain, "0-" + idA + ".wrenn.test", nil, "400 port"},
		{"port with zeros", domain, "080-" + idA + ".wrenn.test", nil, "400 port"},
		{"port with sign", domain, "+80-" + idA + ".wrenn.test", nil, "400 port"},
		{"no port", domain, "-" + idA + ".wrenn.test", nil, "400 port"},
		{"words", domain, "my-" + idA + ".wrenn.test", nil, "400 port"},
		{"no id", domain, "80-.wrenn.test", nil, "400 ID"},
		{"strange id", domain, "80-a_b.wrenn.test", nil, "400 ID"},
		{"id too long", domain, "80-" + long + ".wrenn.test", nil, "400 ID"},
		{"too many parts", domain, "80-" + idA + "-a-b.wrenn.test", nil, "400 host"},
		{"empty old client id", domain, "80-" + idA + "-.wrenn.test", nil, "400 host"},
		{"more labels", domain, "80-" + idA + ".x.wrenn.test", nil, "400"},
		{"unknown name under the domain", domain, "www.wrenn.test", nil, "400 host"},
		{"unknown name with headers", domain, "www.wrenn.test", routing(idA, "80"), "400 host"},
		{"empty label", domain, ".wrenn.test", nil, "400 host"},

		{"API host", domain, "api.wrenn.test:8443", nil, ""},
		{"API host with headers", domain, "api.wrenn.test", routing(idA, "80"), ""},
		{"domain", domain, "wrenn.test", nil, ""},
		{"shared host", domain, "sandbox.wrenn.test", routing(idA, "80"), "80 " + idA},
		{"shared host without headers", domain, "sandbox.wrenn.test", nil, "400 headers"},

		{"localhost", domain, "localhost:7080", nil, ""},
		{"localhost with headers", domain, "localhost:7080", routing(idA, "49983"), "49983 " + idA},
		{"IPv4 with headers", domain, "127.0.0.1:7080", routing(idA, "80"), "80 " + idA},
		{"IPv6 with headers", domain, "[::1]:7080", routing(idA, "80"), "80 " + idA},
		{"IPv6", domain, "[::1]:7080", nil, ""},
		{"own name of the machine with headers", domain, "builder:7080", routing(idA, "80"), "80 " + idA},
		{"suffix that only looks like the domain", domain, "80-" + idA + ".notwrenn.test", nil, ""},
		{"sandbox host of another domain", domain, "80-" + idA + ".other.test", nil, ""},
		{"old id in headers", domain, "localhost", routing(idA+"-00000000", "80"), "80 " + idA},
		{"port missing", domain, "localhost", headers{proxy.HeaderSandboxID: {idA}}, "400 headers"},
		{"id missing", domain, "localhost", headers{proxy.HeaderSandboxPort: {"80"}}, "400 headers"},
		{"two ids", domain, "localhost", headers{proxy.HeaderSandboxID: {idA, idB}, proxy.HeaderSandboxPort: {"80"}}, "400 headers"},
		{"bad port in headers", domain, "localhost", routing(idA, "99999999999999999999"), "400 port"},
		{"bad id in headers", domain, "localhost", routing("../../etc", "80"), "400 ID"},
		{"empty headers", domain, "localhost", routing("", ""), "400"},
		{"no host", domain, "", nil, ""},

		{"any suffix without a domain", "", "8000-" + idA + ".localhost:7080", nil, "8000 " + idA},
		{"wildcard DNS without a domain", "", "8000-" + idA + ".10.0.0.5.nip.test", nil, "8000 " + idA},
		{"other names without a domain", "", "8000-abc.localhost", nil, ""},
		{"no suffix without a domain", "", "8000-" + idA, nil, ""},
		{"headers without a domain", "", "localhost", routing(idA, "80"), "80 " + idA},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := proxy.New(proxy.Config{Domain: tt.domain})
			d, ok, err := p.Route(&http.Request{Host: tt.host, Header: tt.headers})
			got := ""
			switch {
			case err != nil:
				rec := httptest.NewRecorder()
				proxy.RouteError(rec, err)
				got = fmt.Sprint(rec.Code, " ", rec.Body)
				if ct := rec.Header().Get("Content-Type"); !strings.HasPrefix(ct, "text/plain") {
					t.Errorf("Content-Type = %s", ct)
				}
			case ok:
				got = fmt.Sprint(d.Port, " ", d.SandboxID)
			}
			if status, part, refused := strings.Cut(tt.want, " "); refused && status == "400" {
				if !strings.HasPrefix(got, "400 ") || !strings.Contains(got, part) {
					t.Errorf("got %q, want 400 about the %s", got, part)
				}
			} else if got != tt.want && !(tt.want == "400" && strings.HasPrefix(got, "400 ")) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func FuzzRoute(f *testing.F) {
	for _, host := range []string{
		"8000-" + idA + ".wrenn.test", "80-" + idA + "-00000000.wrenn.test:1", "localhost:1", "[::1]:80", "sandbox.wrenn.test",
		"api.wrenn.test", ".wrenn.test", "-.wrenn.test", "[", "", "a:b:c", "80-\x00.wrenn.test", "80-é.wrenn.test",
	} {
		f.Add(host, idA, "80", true)
	}
	withDomain := proxy.New(proxy.Config{Domain: "wrenn.test"})
	without := proxy.New(proxy.Config{})
	f.Fuzz(func(t *testing.T, host, id, port string, sendHeaders bool) {
		r := &http.Request{Host: host, Header: http.Header{}}
		if sendHeaders {
			r.Header[proxy.HeaderSandboxID] = []string{id}
			r.Header[proxy.HeaderSandboxPort] = []string{port}
		}
		for name, p := range map[string]*proxy.Proxy{"domain": withDomain, "no domain": without} {
			d, ok, err := p.Route(r)
			if err != nil || !ok {
				if d != (proxy.Destination{}) {
					t.Errorf("%s: refused, and yet %v", name, d)
				}
				continue
			}
			if d.Port == 0 || d.SandboxID == "" || strings.Trim(d.SandboxID, "abcdefghijklmnopqrstuvwxyz0123456789") != "" {
				t.Errorf("%s: destination %+v", name, d)
			}
			lower := strings.ToLower(host)
			inHost := strings.Contains(lower, strconv.Itoa(int(d.Port))+"-"+d.SandboxID)
			inHeaders := sendHeaders && strings.HasPrefix(id, d.SandboxID) && port == strconv.Itoa(int(d.Port))
			if !inHost && !inHeaders {
				t.Errorf("%s: %+v is named nowhere in %q, %q, %q", name, d, host, id, port)
			}
		}
	})
}

func TestInternalRoutesOfTheAgentAreNotReachable(t *testing.T) {
	w := newWorld(t)
	// The guest agent's port is fixed, so its place is taken on a guest of its own.
	var requests received
	guestAt(t, "127.0.0.2:49983", func(rw http.ResponseWriter, _ *http.Request) {
		requests.add("reached")
		io.WriteString(rw, "agent")
	})
	send := func(target, version string) (int, string) {
		requests.take()
		res, body, err := w.raw(t, fmt.Sprintf("POST %s HTTP/%s\r\nHost: 49983-%s.wrenn.test\r\nContent-Length: 0\r\nConnection: close\r\n\r\n", target, version, idB))
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, body
	}
	for _, target := range []string{
		"/init", "/freeze", "/unfreeze", "/collapse", "/fsfreeze", "/fsthaw", "/upgrade", "/logs", "/poweroff", "/sync", "/%70oweroff",
		"//init", "///init", "/./init", "/x/../init", "/init/", "/init/x", "/init?x=1", "/init?", "/%69nit", "/%2569nit", "/%2Finit",
		"/%2e/init", "/..%2finit", "/INIT", "/init;x", "/init%3bx", "/init%00", "/init%20", `/\init`, "/a%2f..%2finit", "/%69%6E%69%74",
		"http://x.test/init", "http://x.test//init", "/../../init", "/%5cinit",
	} {
		host := strings.Replace(target, "x.test", "49983-"+idB+".wrenn.test", 1)
		if code, body := send(host, "1.1"); code != 404 || len(requests.take()) > 0 {
			t.Errorf("%s: %d %s", target, code, body)
		}
	}
	for _, target := range []string{"/files?path=/init", "/health", "/files/compose", "/process.Process/Start", "/initialize", "/x/init", "/"} {
		if code, body := send(target, "1.1"); code != 200 || body != "agent" {
			t.Errorf("%s: %d %s", target, code, body)
		}
	}
	t.Run("on other ports the names mean nothing", func(t *testing.T) {
		port := guest(t, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "app") })
		if res, body := do(t, w.http1, w.request(t, "POST", idA, port, "/init", nil)); body != "app" {
			t.Errorf("%s %s", res.Status, body)
		}
	})
}

// received is what a guest has seen.
type received struct {
	mu   sync.Mutex
	seen []string
}

func (r *received) add(s string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.seen = append(r.seen, s)
}

// take returns what was seen since the last time.
func (r *received) take() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	seen := r.seen
	r.seen = nil
	return seen
}

func TestNothingIsSmuggled(t *testing.T) {
	w := newWorld(t)
	var requests received
	look := func(_ http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		requests.add(fmt.Sprintf("%s %s %q te=%v cl=%d fold=%q", r.Method, r.RequestURI, body, r.TransferEncoding, r.ContentLength, r.Header.Get("Fold")))
	}
	port := guest(t, look)
	host := fmt.Sprintf("Host: %d-%s.wrenn.test\r\n", port, idA)
	smuggled := "GET /smuggled HTTP/1.1\r\n" + host + "\r\n"
	chunk := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(smuggled), smuggled)
	tests := map[string]struct {
		request string
		refused bool
		arrives string // where it is not refused
	}{
		"length and chunked: chunked counts": {
			request: "POST /a HTTP/1.1\r\n" + host + "Content-Length: 4\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n" + chunk,
			arrives: fmt.Sprintf("POST /a %q te=[chunked] cl=-1 fold=\"\"", smuggled),
		},
		"two lengths":                  {request: "POST /a HTTP/1.1\r\n" + host + "Content-Length: 4\r\nContent-Length: 0\r\n\r\nbody", refused: true},
		"list of lengths":              {request: "POST /a HTTP/1.1\r\n" + host + "Content-Length: 4, 0\r\n\r\nbody", refused: true},
		"negative length":              {request: "POST /a HTTP/1.1\r\n" + host + "Content-Length: -1\r\n\r\n", refused: true},
		"length with sign":             {request: "POST /a HTTP/1.1\r\n" + host + "Content-Length: +4\r\n\r\nbody", refused: true},
		"two transfer codings":         {request: "POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n" + chunk, refused: true},
		"unknown transfer coding":      {request: "POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding: xchunked\r\n\r\n" + chunk, refused: true},
		"space before the colon":       {request: "POST /a HTTP/1.1\r\n" + host + "Transfer-Encoding : chunked\r\nContent-Length: 0\r\n\r\n" + chunk, refused: true},
		"bare CR in a header":          {request: "GET /a HTTP/1.1\r\n" + host + "X: a\rContent-Length: 5\r\n\r\n", refused: true},
		"bare CR in the target":        {request: "GET /a\rX HTTP/1.1\r\n" + host + "\r\n", refused: true},
		"NUL in a header":              {request: "GET /a HTTP/1.1\r\n" + host + "X: a\x00b\r\n\r\n", refused: true},
		"space in the target":          {request: "GET /a b HTTP/1.1\r\n" + host + "\r\n", refused: true},
		"two hosts":                    {request: "GET /a HTTP/1.1\r\n" + host + "Host: other\r\n\r\n", refused: true},
		"folded header becomes a line": {request: "GET /a HTTP/1.1\r\n" + host + "Fold: a\r\n b\r\nConnection: close\r\n\r\n", arrives: `GET /a "" te=[] cl=0 fold="a b"`},
		"routing header dropped by Connection": {
			request: "GET /a HTTP/1.1\r\n" + host + "Connection: close, X-Forwarded-For, Host\r\n\r\n",
			arrives: `GET /a "" te=[] cl=0 fold=""`,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			res, body, err := w.raw(t, tt.request)
			w.waitIdle(t)
			requests := requests.take()
			for _, r := range requests {
				if strings.HasPrefix(r, "GET /smuggled") {
					t.Errorf("the guest saw a second request: %q", requests)
				}
			}
			if tt.refused {
				if err == nil && res.StatusCode < 400 {
					t.Errorf("taken: %s %s", res.Status, body)
				}
			} else if err != nil || len(requests) != 1 || requests[0] != tt.arrives {
				t.Errorf("guest saw %q (%v), want %q", requests, err, tt.arrives)
			}
		})
	}
	t.Run("bad chunk size", func(t *testing.T) {
		arrived, brokenOff := make(chan struct{}), make(chan error, 1)
		port := guest(t, func(_ http.ResponseWriter, r *http.Request) {
			close(arrived)
			_, err := io.ReadAll(r.Body)
			brokenOff <- err
		})
		conn, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		fmt.Fprintf(conn, "POST /a HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n", port, idA)
		receive(t, arrived)
		io.WriteString(conn, "zz\r\n"+smuggled)
		res, err := http.ReadResponse(bufio.NewReader(conn), nil)
		if err != nil || res.StatusCode != 400 || !res.Close {
			t.Errorf("answer = %v, %v; want 400 and the end of the connection", res, err)
		}
		if err := receive(t, brokenOff); err == nil {
			t.Error("the guest saw a whole body")
		}
	})
	t.Run("rest of an upload that nobody reads", func(t *testing.T) {
		port := guest(t, func(rw http.ResponseWriter, _ *http.Request) {
			_ = http.NewResponseController(rw).EnableFullDuplex() // or net/http waits for the body
		})
		conn, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		fmt.Fprintf(conn, "POST /a HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\nTransfer-Encoding: chunked\r\n\r\n", port, idA)
		answer := bufio.NewReader(conn)
		if res, err := http.ReadResponse(answer, nil); err != nil || res.StatusCode != 200 || !res.Close {
			t.Errorf("answer = %v, %v; want 200 and the end of the connection", res, err)
		}
		io.WriteString(conn, "zz\r\n"+smuggled)
		if b, err := io.ReadAll(answer); len(b) > 0 {
			t.Errorf("another answer: %s, %v", b, err)
		}
		if seen := requests.take(); len(seen) > 0 {
			t.Errorf("guest saw %q", seen)
		}
	})
	t.Run("target with spaces over HTTP/2", func(t *testing.T) {
		req := w.request(t, "GET", idA, port, "/", nil)
		req.URL.Opaque = "/a HTTP/1.1 x"
		res, err := w.http2.Do(req)
		if err == nil {
			res.Body.Close()
		}
		if requests := requests.take(); len(requests) != 0 || (err == nil && res.StatusCode != 400) {
			t.Errorf("guest saw %q; answer %v, %v", requests, res, err)
		}
	})
	t.Run("CONNECT", func(t *testing.T) {
		// To a port of the guest agent, whose internal routes are guarded.
		res, _, err := w.raw(t, "CONNECT 49983-"+idA+".wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\nPOST /init HTTP/1.1\r\nHost: x\r\n\r\n")
		if seen := requests.take(); err != nil || res.StatusCode != 403 || len(seen) > 0 {
			t.Errorf("answer = %v, %v; guest saw %q", res, err, seen)
		}
	})
}
