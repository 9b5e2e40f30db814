package proxy_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/coder/websocket"
)

func TestPathFormReachesTheApplicationByteForByte(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(rw, "%s %s %s", r.RequestURI, r.Header.Get("X-Forwarded-Prefix"), r.Host)
	})
	prefix := fmt.Sprintf("/proxy/%s/%d", idA, port)
	for _, target := range []string{"/", "/a", "/a/", "//a//b", "/a%2Fb;c=d/?", "/a/../b", "/?q=/x&y", "/proxy/x/1/", prefix + "/a"} {
		res, body, err := w.raw(t, "GET "+prefix+target+" HTTP/1.1\r\nHost: localhost:7080\r\nX-Forwarded-Prefix: /evil\r\nConnection: close\r\n\r\n")
		if err != nil {
			t.Fatal(err)
		}
		if want := target + " " + prefix + " localhost:7080"; body != want {
			t.Errorf("%s: the application saw %s %q, want %q", target, res.Status, body, want)
		}
	}
	// By host there is no prefix, whatever the client says.
	req := w.request(t, "GET", idA, port, prefix+"/a", nil)
	req.Header.Set("X-Forwarded-Prefix", "/evil")
	if _, body := do(t, w.http1, req); !strings.HasPrefix(body, prefix+"/a  ") {
		t.Errorf("by host the application saw %q", body)
	}
}

func TestPathFormLeadsBackToItself(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/login":
			http.SetCookie(rw, &http.Cookie{Name: "session", Value: "x", Path: "/", Domain: "localhost"})
			http.Redirect(rw, r, "/home/", http.StatusFound)
		case "/home/":
			c, err := r.Cookie("session")
			fmt.Fprint(rw, "home ", c, err)
		case "/absolute":
			rw.Header().Set("Location", fmt.Sprintf("http://%s/home/", r.Context().Value(http.LocalAddrContextKey)))
			rw.WriteHeader(http.StatusMovedPermanently)
		}
	})
	prefix := fmt.Sprintf("/proxy/%s/%d", idA, port)
	for name, client := range w.clients() {
		client := *client
		client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		for path, want := range map[string]string{
			"?a=b":      prefix + "/?a=b",
			"/login":    prefix + "/home/",
			"/absolute": prefix + "/home/",
		} {
			res, err := client.Get(w.url + prefix + path)
			if err != nil {
				t.Fatal(err)
			}
			res.Body.Close()
			if got := res.Header.Get("Location"); got != want {
				t.Errorf("%s: %s leads to %q, want %q", name, path, got, want)
			}
			if path != "/login" {
				continue
			}
			if c := res.Cookies(); len(c) != 1 || c[0].Path != prefix+"/" || c[0].Domain != "" {
				t.Errorf("%s: got cookies %v", name, c)
			}
		}
	}
}

// By host the origin is the application's own.
func TestNoApplicationSpeaksForTheOriginThatAllShare(t *testing.T) {
	w := newWorld(t)
	headers := map[string]string{"Service-Worker-Allowed": "/", "Clear-Site-Data": `"*"`}
	port := guest(t, func(rw http.ResponseWriter, _ *http.Request) {
		for name, value := range headers {
			rw.Header().Set(name, value)
		}
	})
	byPath, err := http.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("%s/proxy/%s/%d/", w.url, idA, port), nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range headers {
		if res, _ := do(t, w.http1, w.request(t, "GET", idA, port, "/", nil)); res.Header.Get(name) != value {
			t.Errorf("by host %s is %q", name, res.Header.Get(name))
		}
		if res, _ := do(t, w.http1, byPath); res.Header.Get(name) != "" {
			t.Errorf("by path %s is %q", name, res.Header.Get(name))
		}
	}
}

func TestPathFormIsNotServedOnTheAPIsName(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "application") })
	for host, served := range map[string]bool{
		"api.wrenn.test": false, "wrenn.test": false, "sandbox.wrenn.test": true, "localhost:1": true, "192.0.2.1": true,
	} {
		req, err := http.NewRequestWithContext(t.Context(), "GET", fmt.Sprintf("%s/proxy/%s/%d/", w.url, idA, port), nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		if res, body := do(t, w.http1, req); served != (body == "application") {
			t.Errorf("%s: got %s %q", host, res.Status, body)
		}
	}
}

func TestPathFormCarriesWebSockets(t *testing.T) {
	w := newWorld(t)
	port := guest(t, websocketEcho)
	ctx := t.Context()
	conn, _, err := websocket.Dial(ctx, fmt.Sprintf("%s/proxy/%s/%d/ws", w.url, idA, port), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.CloseNow()
	if err := conn.Write(ctx, websocket.MessageText, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	if _, data, err := conn.Read(ctx); err != nil || string(data) != "hello" {
		t.Errorf("got %q, %v", data, err)
	}
}
