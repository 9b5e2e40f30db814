package http1_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/wrenn/wrenn/internal/server/http1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// serve starts a server whose handler answers what it takes with "here", and a
// net/http server behind it that answers "there". It returns its address.
func serve(t testing.TB, h http.HandlerFunc) string {
	t.Helper()
	s := http1.New(http1.Config{
		Take: func(r *http.Request) http.Handler {
			if r.Host == "there" {
				return nil
			}
			return h
		},
		HeaderTimeout: 300 * time.Millisecond, IdleTimeout: time.Minute, Log: slog.New(slog.DiscardHandler),
	})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	behind := &http.Server{ReadHeaderTimeout: time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		fmt.Fprintf(w, "there %s %s %q %v", r.Method, r.RequestURI, body, err)
	})}
	ended := make(chan error, 2)
	go func() { ended <- s.Serve(l, nil) }()
	go func() { ended <- behind.Serve(s) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.Shutdown(ctx)
		behind.Close()
		<-ended
		<-ended
	})
	return l.Addr().String()
}

type client struct {
	net.Conn
	r *bufio.Reader
}

func dial(t testing.TB, addr string) *client {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(10 * time.Second))
	return &client{c, bufio.NewReader(c)}
}

func (c *client) send(t testing.TB, text string) {
	t.Helper()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
}

func (c *client) answer(t testing.TB) string {
	t.Helper()
	res, err := http.ReadResponse(c.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprint(res.StatusCode, " ", string(body))
}

func here(w http.ResponseWriter, r *http.Request) {
	fmt.Fprintf(w, "here %s %s", r.Method, r.RequestURI)
}

func TestWhatIsNotPlainIsServedByNetHTTPWithoutLosingAByte(t *testing.T) {
	addr := serve(t, here)
	for name, tt := range map[string]struct{ request, want string }{
		"plain":                      {"GET /a HTTP/1.1\r\nHost: x\r\n\r\n", "200 here GET /a"},
		"not taken":                  {"GET /a HTTP/1.1\r\nHost: there\r\n\r\n", `200 there GET /a "" <nil>`},
		"body":                       {"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody", `200 there POST /a "body" <nil>`},
		"GET with a body":            {"GET /a HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\nbody", `200 there GET /a "body" <nil>`},
		"chunked":                    {"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n", `200 there POST /a "body" <nil>`},
		"both framings":              {"GET /a HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", `200 there GET /a "" <nil>`},
		"absolute form":              {"GET http://x/a HTTP/1.1\r\nHost: x\r\n\r\n", `200 there GET http://x/a "" <nil>`},
		"no host":                    {"GET /a HTTP/1.1\r\n\r\n", "400 400 Bad Request"},
		"two hosts":                  {"GET /a HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", "400 400 Bad Request"},
		"space before the colon":     {"GET /a HTTP/1.1\r\nHost: x\r\nA : b\r\n\r\n", "400 400 Bad Request"},
		"NUL":                        {"GET /a HTTP/1.1\r\nHost: x\r\nA: b\x00\r\n\r\n", "400 400 Bad Request"},
		"bare CR":                    {"GET /a HTTP/1.1\r\nHost: x\r\nA: b\rB: c\r\n\r\n", "400 400 Bad Request"},
		"bare LF":                    {"GET /a HTTP/1.1\nHost: x\n\n", `200 there GET /a "" <nil>`},
		"folded":                     {"GET /a HTTP/1.1\r\nHost: x\r\nA: b\r\n c\r\n\r\n", `200 there GET /a "" <nil>`},
		"unknown version":            {"GET /a HTTP/1.2\r\nHost: x\r\n\r\n", `200 there GET /a "" <nil>`},
		"header that is large":       {"GET /a HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("b", 100<<10) + "\r\n\r\n", `200 there GET /a "" <nil>`},
		"header of many lines":       {"GET /a HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("A: b\r\n", 500) + "\r\n", `200 there GET /a "" <nil>`},
		"header of some size":        {"GET /a HTTP/1.1\r\nHost: x\r\nA: " + strings.Repeat("b", 10<<10) + "\r\n\r\n", "200 here GET /a"},
		"connection option":          {"GET /a HTTP/1.1\r\nHost: x\r\nConnection: A\r\n\r\n", `200 there GET /a "" <nil>`},
		"garbage":                    {"\x16\x03\x01\x00\n\r\n\r\n", "400 400 Bad Request"},
		"HTTP/1.0 ends with the end": {"GET /a HTTP/1.0\r\nHost: x\r\n\r\n", "200 here GET /a"},
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, addr)
			c.send(t, tt.request)
			if got := c.answer(t); got != tt.want && !(tt.want == "400 400 Bad Request" && strings.HasPrefix(got, tt.want)) {
				t.Errorf("answer = %q, want %q", got, tt.want)
			}
		})
	}
}

func TestRequestsFollowEachOtherOnAConnection(t *testing.T) {
	addr := serve(t, here)
	c := dial(t, addr)
	// At once, in pieces, and on to net/http.
	c.send(t, "GET /1 HTTP/1.1\r\nHost: x\r\n\r\nHEAD /2 HTTP/1.1\r\nHost: x\r\n\r\nGET /3 HTTP/1.1\r\nHo")
	if got := c.answer(t); got != "200 here GET /1" {
		t.Errorf("first = %q", got)
	}
	res, err := http.ReadResponse(c.r, &http.Request{Method: "HEAD"})
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("second = %v, %v", res, err)
	}
	c.send(t, "st: x\r\n\r\n")
	if got := c.answer(t); got != "200 here GET /3" {
		t.Errorf("third = %q", got)
	}
	c.send(t, "POST /4 HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\nzGET /5 HTTP/1.1\r\nHost: x\r\n\r\n")
	for _, want := range []string{`200 there POST /4 "z" <nil>`, `200 there GET /5 "" <nil>`} {
		if got := c.answer(t); got != want {
			t.Errorf("answer = %q, want %q", got, want)
		}
	}
}

func TestNextRequestMayComeWhileAnAnswerIsLate(t *testing.T) {
	next := make(chan struct{})
	addr := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/1" {
			<-next
		}
		here(w, r)
	})
	c := dial(t, addr)
	c.send(t, "GET /1 HTTP/1.1\r\nHost: x\r\n\r\n")
	time.Sleep(50 * time.Millisecond) // until the client is watched
	c.send(t, "GET /2 HTTP/1.1\r\nHost: x\r\n\r\n")
	time.Sleep(10 * time.Millisecond)
	close(next)
	for _, want := range []string{"200 here GET /1", "200 here GET /2"} {
		if got := c.answer(t); got != want {
			t.Errorf("answer = %q, want %q", got, want)
		}
	}
}

func TestClientThatLeavesIsNoticed(t *testing.T) {
	arrived, left := make(chan struct{}), make(chan struct{})
	addr := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		close(arrived)
		<-r.Context().Done()
		close(left)
	})
	c := dial(t, addr)
	c.send(t, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	<-arrived
	c.Close()
	select {
	case <-left:
	case <-time.After(5 * time.Second):
		t.Fatal("not noticed within 5 s")
	}
}

func TestClientThatSendsNothingMoreGetsItsAnswer(t *testing.T) {
	addr := serve(t, func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
			return
		case <-time.After(100 * time.Millisecond):
		}
		here(w, r)
	})
	for name, request := range map[string]string{
		"HTTP/1.0":                   "GET / HTTP/1.0\r\nHost: x\r\n\r\n",
		"HTTP/1.1, Connection close": "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, addr)
			c.send(t, request)
			c.Conn.(*net.TCPConn).CloseWrite()
			if got := c.answer(t); got != "200 here GET /" {
				t.Errorf("answer = %q", got)
			}
			if rest, err := io.ReadAll(c.r); err != nil || len(rest) > 0 {
				t.Errorf("then %q, %v", rest, err)
			}
		})
	}
}

func TestSlowHeadersAreGivenUp(t *testing.T) {
	addr := serve(t, here)
	for name, starts := range map[string]string{"nothing": "", "half a header": "GET / HTTP/1.1\r\nHost: x\r\nA: "} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, addr)
			begin := time.Now()
			c.send(t, starts)
			stop := make(chan struct{})
			go func() { // a byte now and then does not help
				for {
					select {
					case <-stop:
						return
					case <-time.After(50 * time.Millisecond):
						if starts != "" {
							io.WriteString(c, "b")
						}
					}
				}
			}()
			defer close(stop)
			rest, _ := io.ReadAll(c.r)
			if took := time.Since(begin); took > 2*time.Second || took < 200*time.Millisecond || len(rest) > 0 {
				t.Errorf("ended after %s with %q", took, rest)
			}
		})
	}
}

func TestAnswersAreFramed(t *testing.T) {
	for name, tt := range map[string]struct {
		h       http.HandlerFunc
		request string
		want    string // after the Date
	}{
		"nothing": {func(http.ResponseWriter, *http.Request) {}, "", "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"},
		"length": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "2")
			io.WriteString(w, "ab")
		}, "", "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nab"},
		"chunks": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "ab")
			io.WriteString(w, "c")
		}, "", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"},
		"not modified": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(304)
			io.WriteString(w, "ab")
		}, "", "HTTP/1.1 304 Not Modified\r\n\r\n"},
		"early hints": {func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(103)
			w.WriteHeader(204)
		}, "", "HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n"},
		"trailer": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer", "A")
			io.WriteString(w, "x")
			w.Header().Set("A", "1\r\nB: 2")
		}, "", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: A\r\n\r\n1\r\nx\r\n0\r\nA: 1  B: 2\r\n\r\n"},
		"line break in a value": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("A", "1\r\nB: 2")
			w.WriteHeader(204)
		}, "", "HTTP/1.1 204 No Content\r\nA: 1  B: 2\r\n\r\n"},
		"HTTP/1.0 without a length": {func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ab") },
			"GET / HTTP/1.0\r\nHost: x\r\n\r\n", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nab"},
		"less than promised": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", "3")
			io.WriteString(w, "ab")
		}, "", "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab"},
		"given up in chunks": {func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "ab")
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, "", "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n"},
	} {
		t.Run(name, func(t *testing.T) {
			addr := serve(t, func(w http.ResponseWriter, r *http.Request) {
				w.Header()["Date"] = []string{}
				tt.h(w, r)
			})
			c := dial(t, addr)
			if tt.request == "" {
				tt.request = "GET / HTTP/1.1\r\nHost: x\r\n\r\n"
			}
			c.send(t, tt.request)
			c.Conn.(*net.TCPConn).CloseWrite()
			got, _ := io.ReadAll(c.r)
			if string(got) != tt.want {
				t.Errorf("got  %q\nwant %q", got, tt.want)
			}
		})
	}
}

func TestAnswerThatIsGivenUpDoesNotLookWhole(t *testing.T) {
	addr := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "ab")
		w.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	c := dial(t, addr)
	c.send(t, "GET / HTTP/1.0\r\nHost: x\r\n\r\n")
	if all, err := io.ReadAll(c.r); err == nil {
		t.Errorf("a clean end after %q", all)
	}
}

// FuzzHead holds what is served here against what net/http makes of the same bytes.
func FuzzHead(f *testing.F) {
	for _, seed := range []string{
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "GET /a?b HTTP/1.0\r\nHost: x:1\r\nA:\t b \r\na: c\r\nConnection: Close\r\n\r\n",
		"DELETE //x%2f HTTP/1.1\r\nHost: [::1]\r\nCookie: a=b\r\n\r\nGET", "GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, head []byte) {
		got, end := http1.Parse(head)
		if got == nil {
			return
		}
		r := bufio.NewReader(strings.NewReader(string(head)))
		want, err := http.ReadRequest(r)
		if err != nil {
			t.Fatalf("taken, and net/http says %v: %q", err, head)
		}
		if want.ContentLength != 0 || len(want.TransferEncoding) > 0 {
			t.Fatalf("has a body: %q", head)
		}
		rest, _ := io.ReadAll(r)
		if len(rest) != len(head)-end {
			t.Fatalf("ends at %d, not at %d: %q", end, len(head)-len(rest), head)
		}
		if got.Method != want.Method || got.RequestURI != want.RequestURI || got.Host != want.Host || got.Proto != want.Proto {
			t.Fatalf("%s %s %s %s, want %s %s %s %s", got.Method, got.RequestURI, got.Host, got.Proto, want.Method, want.RequestURI, want.Host, want.Proto)
		}
		if fmt.Sprint(got.Header) != fmt.Sprint(want.Header) {
			t.Fatalf("header %v, want %v", got.Header, want.Header)
		}
	})
}
