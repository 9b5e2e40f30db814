package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/wrenn/wrenn/internal/proxy"
)

func TestWebSocketOverHTTP2ThatIsEndedAtOnceHarmsNobody(t *testing.T) {
	w := newWorld(t)
	ended := make(chan struct{})
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		defer close(ended)
		websocketEcho(rw, r)
	})
	f := dialFrames(t, w)
	var block bytes.Buffer
	h := hpack.NewEncoder(&block)
	for _, kv := range [][2]string{
		{":method", "CONNECT"}, {":protocol", "websocket"}, {":scheme", "http"}, {":path", "/ws"},
		{":authority", fmt.Sprintf("%d-%s.wrenn.test", port, idA)}, {"sec-websocket-version", "13"},
	} {
		h.WriteField(hpack.HeaderField{Name: kv[0], Value: kv[1]})
	}
	f.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block.Bytes(), EndHeaders: true, EndStream: true})
	receive(t, ended)
	w.waitIdle(t)
	if res, _ := do(t, w.http1, w.request(t, "GET", idA, closedPort(t), "/", nil)); res.StatusCode != 502 {
		t.Errorf("afterwards: %s", res.Status)
	}
}

func TestWebSocketOverHTTP2IsOpenOnlyWhenTheApplicationSwitches(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "<html>a page for every path") })
	if res, _ := w.connect(t, port, http.Header{}); res.StatusCode != 502 {
		t.Errorf("answer = %s", res.Status)
	}
}

// An application may answer without having asked for the body, and keep the
// connection: then it waits for the body, and takes for it what comes next.
func TestConnectionThatIsOwedABodyCarriesNoFurtherRequest(t *testing.T) {
	w := newWorld(t)
	port := tcpServer(t, func(c *net.TCPConn) {
		br := bufio.NewReader(c)
		for {
			r, err := http.ReadRequest(br)
			if err != nil {
				return
			}
			if r.Header.Get("Expect") != "" {
				io.WriteString(c, "HTTP/1.1 403 No\r\nContent-Length: 0\r\n\r\n")
			} else {
				io.WriteString(c, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
			}
			io.Copy(io.Discard, r.Body)
		}
	})
	first := w.dial(t)
	fmt.Fprintf(first, "POST /a HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\nExpect: 100-continue\r\nContent-Length: 24\r\n\r\n", port, idA)
	if res, err := http.ReadResponse(bufio.NewReader(first), nil); err != nil || res.StatusCode != 403 {
		t.Fatalf("first = %v, %v", res, err)
	}
	first.Close()
	w.waitIdle(t)
	res, body := do(t, w.http1, w.request(t, "POST", idA, port, "/b", strings.NewReader("body")))
	if res.StatusCode != 200 || body != "ok" {
		t.Errorf("second = %s %q", res.Status, body)
	}
}

func TestAnswersThatAreNoneLeaveNothingBehind(t *testing.T) {
	w := newWorld(t)
	port := tcpServer(t, func(c *net.TCPConn) {
		http.ReadRequest(bufio.NewReader(c))
		io.WriteString(c, "HTTP/1.1 042 x\r\n\r\n")
	})
	open := func() int {
		entries, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(entries)
	}
	before := open()
	for range 50 {
		for _, method := range []string{"GET", "POST"} {
			if res, _ := do(t, w.http1, w.request(t, method, idA, port, "/", strings.NewReader("x"))); res.StatusCode != 502 {
				t.Errorf("%s: %s", method, res.Status)
			}
		}
	}
	w.waitIdle(t)
	w.http1.CloseIdleConnections()
	deadline := time.Now().Add(10 * time.Second)
	for open() > before+10 {
		if time.Now().After(deadline) {
			t.Fatalf("%d descriptors before, %d after", before, open())
		}
		time.Sleep(10 * time.Millisecond) // between two looks
	}
}

// fullConn takes so many bytes, as a connection does whose other end does not read.
type fullConn struct {
	net.Conn
	left   int
	closed chan struct{}
	once   sync.Once
}

func (c *fullConn) Write(b []byte) (int, error) {
	if len(b) <= c.left {
		c.left -= len(b)
		return c.Conn.Write(b)
	}
	n, _ := c.Conn.Write(b[:c.left])
	c.left = 0
	<-c.closed
	return n, net.ErrClosed
}

func (c *fullConn) SetDeadline(t time.Time) error {
	if !t.IsZero() {
		c.once.Do(func() { close(c.closed) })
	}
	return c.Conn.SetDeadline(t)
}

func (c *fullConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}

func TestAnswerIsNotHeldUpByAnApplicationThatReadsNoMore(t *testing.T) {
	const size = 40 << 10
	w := newWorldWith(t, proxy.Config{Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		return &fullConn{Conn: c, left: size, closed: make(chan struct{})}, nil // header and body are a little more
	}})
	end := make(chan struct{})
	defer close(end)
	port := tcpServer(t, func(c *net.TCPConn) {
		c.Read(make([]byte, 1)) // and no more
		time.Sleep(200 * time.Millisecond)
		io.WriteString(c, "HTTP/1.1 401 No\r\nContent-Length: 2\r\n\r\nno")
		<-end
	})
	for name, c := range w.clients() {
		begun := time.Now()
		_, body := do(t, c, w.request(t, "POST", idA, port, "/", strings.NewReader(strings.Repeat("x", size))))
		if took := time.Since(begun); body != "no" || took > 5*time.Second {
			t.Errorf("%s: %q after %s", name, body, took)
		}
	}
}

func TestClientThatIsGoneAfterItsLastRequestIsNoticed(t *testing.T) {
	for name, header := range map[string]string{
		"here": "", "in net/http": "Proxy-Connection: x\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			arrived := make(chan struct{})
			port := guest(t, func(_ http.ResponseWriter, r *http.Request) {
				close(arrived)
				<-r.Context().Done()
			})
			c := w.dial(t)
			fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\nConnection: close\r\n%s\r\n", port, idA, header)
			c.CloseWrite()
			receive(t, arrived)
			time.Sleep(100 * time.Millisecond) // until its end has been read
			if w.proxy.OpenStreams() != 1 {
				t.Error("the end of what it sends was taken for its own")
			}
			c.SetLinger(0)
			c.Close()
			w.waitIdle(t)
		})
	}
}

func TestClientThatIsGoneFromAHalfClosedUpgradeIsNoticed(t *testing.T) {
	w := newWorld(t)
	end := make(chan struct{})
	defer close(end)
	port := upgradedGuest(t, func(*net.TCPConn, *bufio.Reader) { <-end })
	conn := w.dial(t)
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", port, idA)
	if res, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil || res.StatusCode != 101 {
		t.Fatalf("answer = %v, %v", res, err)
	}
	conn.CloseWrite()
	time.Sleep(100 * time.Millisecond) // until its end has been read
	if w.proxy.OpenStreams() != 1 {
		t.Error("the end of what it sends was taken for its own")
	}
	conn.SetLinger(0)
	conn.Close()
	w.waitIdle(t)
}

func TestAnswerWithALargeHeaderIsRefused(t *testing.T) {
	w := newWorld(t)
	port := tcpServer(t, func(c *net.TCPConn) {
		http.ReadRequest(bufio.NewReader(c))
		io.WriteString(c, "HTTP/1.1 200 OK\r\n"+strings.Repeat("A: \r\n", 20_000)+"\r\n")
	})
	if res, body := do(t, w.http1, w.request(t, "GET", idA, port, "/", nil)); res.StatusCode != 502 {
		t.Errorf("answer = %s %q", res.Status, body)
	}
}

func TestHeadsThatHaveNoBodyHaveNoLength(t *testing.T) {
	w := newWorld(t)
	for name, tt := range map[string]struct{ sends, want string }{
		"103": {
			"HTTP/1.1 103 Early\r\nLink: a\r\nContent-Length: 5\r\nKeep-Alive: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\nDate: x\r\n\r\nok",
			"HTTP/1.1 103 Early Hints\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\n",
		},
		"204": {"HTTP/1.1 204 No\r\nContent-Length: 5\r\nDate: x\r\n\r\n", "HTTP/1.1 204 No Content\r\nConnection: close\r\nDate: x\r\n\r\n"},
	} {
		port := tcpServer(t, func(c *net.TCPConn) {
			http.ReadRequest(bufio.NewReader(c))
			io.WriteString(c, tt.sends)
		})
		c := w.dial(t)
		fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\nConnection: close\r\n\r\n", port, idA)
		if b, err := io.ReadAll(c); err != nil || !strings.HasPrefix(string(b), tt.want) {
			t.Errorf("%s: %q, %v; want %q", name, b, err, tt.want)
		}
	}
}
