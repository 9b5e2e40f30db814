package proxy_test

import (
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
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
)

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
