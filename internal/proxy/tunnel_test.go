package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/wrenn/wrenn/internal/tunnel"
)

// An end is a client's end of a tunnel.
type end interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// ways are how a client comes to a tunnel.
var ways = map[string]func(t testing.TB, w *world, port uint16) end{
	"CONNECT over HTTP/1.1": connectHTTP1,
	"CONNECT over HTTP/2":   connectHTTP2,
	"WebSocket":             openWebSocket,
	"WebSocket over HTTP/2": openWebSocketHTTP2,
	"a library's WebSocket": openForeignWebSocket,
	"CONNECT with HTTP/1.0": func(t testing.TB, w *world, port uint16) end { return connectRaw(t, w, port, "HTTP/1.0\r\n\r\n") },
	"CONNECT through headers": func(t testing.TB, w *world, port uint16) end {
		return connectAs(t, w, fmt.Sprintf("CONNECT db.internal:5432 HTTP/1.1\r\nHost: db.internal:5432\r\nE2b-Sandbox-Id: %s\r\nE2b-Sandbox-Port: %d\r\n\r\n", idA, port))
	},
}

func connectHTTP1(t testing.TB, w *world, port uint16) end {
	return connectRaw(t, w, port, "HTTP/1.1\r\nHost: x\r\nProxy-Connection: keep-alive\r\n\r\n")
}

func connectRaw(t testing.TB, w *world, port uint16, rest string) end {
	t.Helper()
	return connectAs(t, w, fmt.Sprintf("CONNECT %d-%s.wrenn.test:443 %s", port, idA, rest))
}

func connectAs(t testing.TB, w *world, request string) end {
	t.Helper()
	conn := w.dial(t)
	io.WriteString(conn, request)
	br := bufio.NewReader(conn)
	res, err := http.ReadResponse(br, &http.Request{Method: "CONNECT"})
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("answer to CONNECT: %v, %v", res, err)
	}
	return &readAhead{conn, br}
}

func (w *world) dial(t testing.TB) *net.TCPConn {
	t.Helper()
	conn, err := net.Dial("tcp", w.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(2 * time.Minute))
	return conn.(*net.TCPConn)
}

type readAhead struct {
	*net.TCPConn
	br *bufio.Reader
}

func (c *readAhead) Read(b []byte) (int, error) { return c.br.Read(b) }

// streamEnd is an HTTP/2 stream.
type streamEnd struct {
	io.ReadCloser
	*io.PipeWriter
}

func (s *streamEnd) Close() error {
	s.PipeWriter.CloseWithError(io.ErrClosedPipe)
	return s.ReadCloser.Close()
}
func (s *streamEnd) CloseWrite() error { return s.PipeWriter.Close() }

func connectHTTP2(t testing.TB, w *world, port uint16) end {
	t.Helper()
	body, upload := io.Pipe()
	req := w.request(t, "CONNECT", idA, port, "", body)
	req.ContentLength = -1
	res, err := w.http2.Do(req)
	if err != nil || res.StatusCode != 200 {
		t.Fatalf("answer to CONNECT: %v, %v", res, err)
	}
	s := &streamEnd{res.Body, upload}
	t.Cleanup(func() { s.Close() })
	return s
}

func openWebSocket(t testing.TB, w *world, port uint16) end {
	t.Helper()
	req := w.request(t, "GET", idA, port, "/any/path", nil)
	key := tunnel.Ask(req.Header)
	res, err := w.http1.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	if err := tunnel.Check(res, key); err != nil {
		t.Fatal(err)
	}
	c := tunnel.New(res.Body.(io.ReadWriteCloser), tunnel.Config{Client: true})
	t.Cleanup(func() { c.Close() })
	return c
}

// foreignEnd speaks to a tunnel by what the documentation says, with a library that
// knows nothing of it.
type foreignEnd struct {
	*websocket.Conn
	message io.Reader
	ended   bool
}

func openForeignWebSocket(t testing.TB, w *world, port uint16) end {
	t.Helper()
	c, _, err := websocket.Dial(context.Background(), w.url, &websocket.DialOptions{
		HTTPClient: w.http1, Host: fmt.Sprintf("%d-%s.wrenn.test", port, idA), Subprotocols: []string{"chat", tunnel.Protocol},
	})
	if err != nil {
		t.Fatal(err)
	}
	if c.Subprotocol() != tunnel.Protocol {
		t.Fatalf("subprotocol %q", c.Subprotocol())
	}
	c.SetReadLimit(tunnel.MaxMessage)
	t.Cleanup(func() { c.CloseNow() })
	return &foreignEnd{Conn: c}
}

func (f *foreignEnd) Read(b []byte) (int, error) {
	for {
		if f.ended {
			return 0, io.EOF
		}
		if f.message == nil {
			kind, message, err := f.Conn.Reader(context.Background())
			if err != nil {
				return 0, err
			}
			f.message, f.ended = message, kind == websocket.MessageText
		}
		n, err := f.message.Read(b)
		if err == io.EOF {
			f.message = nil
			err = nil
		}
		if n > 0 || err != nil {
			return n, err
		}
	}
}

func (f *foreignEnd) Write(b []byte) (int, error) {
	return len(b), f.Conn.Write(context.Background(), websocket.MessageBinary, b)
}
func (f *foreignEnd) CloseWrite() error {
	return f.Conn.Write(context.Background(), websocket.MessageText, nil)
}
func (f *foreignEnd) Close() error { return f.Conn.CloseNow() }

// tcpServer is a server in sandbox A.
func tcpServer(t testing.TB, serve func(c *net.TCPConn)) uint16 {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			})
		}
	})
	t.Cleanup(func() { ln.Close(); running.Wait() })
	return uint16(ln.Addr().(*net.TCPAddr).Port)
}

func echoBytes(c *net.TCPConn) { io.Copy(c, c) }

func eachWay(t *testing.T, f func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end)) {
	for name, open := range ways {
		t.Run(name, func(t *testing.T) { f(t, newWorld(t), open) })
	}
}

func TestTunnelCarriesBytesAsTheyCome(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		checkEcho(t, open(t, w, tcpServer(t, echoBytes)))
		w.waitIdle(t)
	})
}

// checkEcho sends and gets back, ends its direction, and sees the other one end.
func checkEcho(t *testing.T, c end) {
	t.Helper()
	for i := range 20 {
		sent := strings.Repeat(fmt.Sprint(i), 1+i*i*i)
		if _, err := io.WriteString(c, sent); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(sent))
		if _, err := io.ReadFull(c, got); err != nil || string(got) != sent {
			t.Fatalf("of %d bytes %q came back, %v", len(sent), got, err)
		}
	}
	c.CloseWrite()
	if rest, err := io.ReadAll(c); err != nil || len(rest) > 0 {
		t.Errorf("end = %q, %v", rest, err)
	}
	c.Close()
}

func TestServerThatSpeaksFirstIsHeard(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		c := open(t, w, tcpServer(t, func(c *net.TCPConn) { io.WriteString(c, "SSH-2.0-x\r\n"); io.Copy(io.Discard, c) }))
		got := make([]byte, 11)
		if _, err := io.ReadFull(c, got); err != nil || string(got) != "SSH-2.0-x\r\n" {
			t.Errorf("greeting = %q, %v", got, err)
		}
	})
}

func TestClientMayEndItsDirectionFirst(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		// As cat or sort: the answer comes after the end of the question.
		c := open(t, w, tcpServer(t, func(c *net.TCPConn) {
			question, err := io.ReadAll(c)
			fmt.Fprintf(c, "%d bytes, %v. ", len(question), err)
			for range 3 {
				io.WriteString(c, "more ")
			}
		}))
		c.Write(make([]byte, 100_000))
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if answer, err := io.ReadAll(c); err != nil || string(answer) != "100000 bytes, <nil>. more more more " {
			t.Errorf("answer = %q, %v", answer, err)
		}
		c.Close()
		w.waitIdle(t)
	})
}

func TestServerMayEndItsDirectionFirst(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		if strings.HasSuffix(t.Name(), "CONNECT_over_HTTP/2") {
			t.Skip("a stream of net/http's server has its end when its handler returns")
		}
		received := make(chan string, 1)
		c := open(t, w, tcpServer(t, func(c *net.TCPConn) {
			io.WriteString(c, "all I have to say")
			c.CloseWrite()
			rest, err := io.ReadAll(c)
			received <- fmt.Sprint(string(rest), err)
		}))
		if said, err := io.ReadAll(c); err != nil || string(said) != "all I have to say" {
			t.Fatalf("the server said %q, %v", said, err)
		}
		for range 3 {
			io.WriteString(c, "and still ")
		}
		c.CloseWrite()
		if got := receive(t, received); got != "and still and still and still <nil>" {
			t.Errorf("the server got %q", got)
		}
		c.Close()
		w.waitIdle(t)
	})
}

func TestServerThatClosesEndsTheTunnel(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		c := open(t, w, tcpServer(t, func(c *net.TCPConn) { io.WriteString(c, "bye") }))
		if said, err := io.ReadAll(c); err != nil || string(said) != "bye" {
			t.Fatalf("the server said %q, %v", said, err)
		}
		c.Close()
		w.waitIdle(t)
	})
}

func TestConnectionThatIsResetBreaksTheTunnel(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		c := open(t, w, tcpServer(t, func(c *net.TCPConn) {
			io.ReadFull(c, make([]byte, 1))
			c.SetLinger(0)
		}))
		c.Write([]byte("x"))
		_, err := io.ReadAll(c)
		if err == nil {
			t.Error("the tunnel ended properly")
		}
		var closed *tunnel.CloseError
		if _, ours := c.(*tunnel.Conn); ours && (!errors.As(err, &closed) || closed.Code != tunnel.CodeReset) {
			t.Errorf("the WebSocket ended with %v", err)
		}
		if foreign, ok := c.(*foreignEnd); ok && websocket.CloseStatus(err) != tunnel.CodeReset {
			t.Errorf("the WebSocket %v ended with %v", foreign, err)
		}
		w.waitIdle(t)
	})
}

func TestClientThatBreaksOffResetsTheConnection(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		ended := make(chan error, 1)
		c := open(t, w, tcpServer(t, func(c *net.TCPConn) {
			_, err := io.Copy(c, c)
			ended <- err
		}))
		c.Write([]byte("x"))
		io.ReadFull(c, make([]byte, 1))
		if tcp, ok := c.(*readAhead); ok {
			tcp.SetLinger(0)
		}
		c.Close()
		if err := receive(t, ended); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the server's read ended with %v, want a reset", err)
		}
		w.waitIdle(t)
	})
}

func TestEvictBreaksTunnelsOff(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		ended := make(chan error, 1)
		port := tcpServer(t, func(c *net.TCPConn) {
			_, err := io.Copy(c, c)
			ended <- err
		})
		c := open(t, w, port)
		c.Write([]byte("x"))
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		w.kill(idA)
		_, err := io.ReadAll(c)
		if err == nil {
			t.Error("the client saw a proper end")
		}
		if _, tcp := c.(*readAhead); tcp && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the client's read ended with %v, want a reset", err)
		}
		if err := receive(t, ended); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the server's read ended with %v, want a reset", err)
		}
		w.waitIdle(t)
	})
}

func TestEvictFreesTunnelsThatAreStuck(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		stalled := make(chan struct{})
		c := open(t, w, tcpServer(t, func(c *net.TCPConn) { writeUntilStalled(c, stalled) }))
		receive(t, stalled)
		upstalled := make(chan struct{})
		var up sync.WaitGroup
		up.Go(func() { writeUntilStalled(c, upstalled) })
		receive(t, upstalled)
		w.kill(idA)
		w.waitIdle(t)
		c.Close()
		up.Wait()
	})
}

// writeUntilStalled writes until nothing gets through for a while, says so, and
// goes on to the end.
func writeUntilStalled(to io.Writer, stalled chan struct{}) {
	var once sync.Once
	piece := make([]byte, 64<<10)
	for {
		timer := time.AfterFunc(300*time.Millisecond, func() { once.Do(func() { close(stalled) }) })
		_, err := to.Write(piece)
		timer.Stop()
		if err != nil {
			return
		}
	}
}

func TestSlowReaderHoldsTheSenderBack(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		stalled := make(chan struct{})
		c := open(t, w, tcpServer(t, func(c *net.TCPConn) { writeUntilStalled(c, stalled) }))
		receive(t, stalled)
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		if m.HeapInuse > 64<<20 {
			t.Errorf("%d MiB are in use while a tunnel stands still", m.HeapInuse>>20)
		}
		// The other direction is not held back by it.
		sent := make(chan struct{})
		go func() { defer close(sent); c.Write([]byte("x")) }()
		receive(t, sent)
	})
}

func TestTunnelToAClosedPortIsRefusedBeforeItOpens(t *testing.T) {
	w := newWorld(t)
	port := closedPort(t)
	closed := fmt.Sprintf(`{"sandboxId":"%s","message":"The sandbox is running but port is not open","port":%d,"code":502}`+"\n", idA, port)
	unknown := strings.Repeat("z", 20)
	gone := `{"sandboxId":"` + unknown + `","message":"The sandbox was not found","code":502}` + "\n"
	for _, c := range []struct{ name, id, want string }{{"closed port", idA, closed}, {"unknown sandbox", unknown, gone}} {
		t.Run(c.name+", CONNECT", func(t *testing.T) {
			res, body, err := w.raw(t, fmt.Sprintf("CONNECT %d-%s.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\n", port, c.id))
			if err != nil || res.StatusCode != 502 || body != c.want || !res.Close {
				t.Errorf("answer = %v %q, %v", res, body, err)
			}
		})
		t.Run(c.name+", CONNECT over HTTP/2", func(t *testing.T) {
			res, body := do(t, w.http2, w.request(t, "CONNECT", c.id, port, "", strings.NewReader("x")))
			if res.StatusCode != 502 || body != c.want {
				t.Errorf("answer = %v %q", res, body)
			}
		})
		t.Run(c.name+", WebSocket", func(t *testing.T) {
			req := w.request(t, "GET", c.id, port, "/", nil)
			tunnel.Ask(req.Header)
			if res, body := do(t, w.http1, req); res.StatusCode != 502 || body != c.want {
				t.Errorf("answer = %v %q", res, body)
			}
		})
	}
}

func TestNoTunnelLeadsToTheGuestAgent(t *testing.T) {
	w := newWorld(t)
	guestAt(t, "127.0.0.1:49983", func(http.ResponseWriter, *http.Request) { t.Error("the guest agent was reached") })
	for _, port := range []uint16{49983, 49984} {
		res, body, err := w.raw(t, fmt.Sprintf("CONNECT %d-%s.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\nGET /init HTTP/1.1\r\nHost: x\r\n\r\n", port, idA))
		if err != nil || res.StatusCode != 403 || !res.Close {
			t.Errorf("CONNECT to %d: %v %q, %v", port, res, body, err)
		}
		if res, body := do(t, w.http2, w.request(t, "CONNECT", idA, port, "", strings.NewReader("GET /init"))); res.StatusCode != 403 {
			t.Errorf("CONNECT over HTTP/2 to %d: %v %q", port, res, body)
		}
		req := w.request(t, "GET", idA, port, "/", nil)
		tunnel.Ask(req.Header)
		if res, body := do(t, w.http1, req); res.StatusCode != 403 {
			t.Errorf("WebSocket to %d: %v %q", port, res, body)
		}
	}
}

func TestTunnelsThatAreAskedForWronglyAreRefused(t *testing.T) {
	w := newWorld(t)
	port := tcpServer(t, echoBytes)
	host := fmt.Sprintf("%d-%s.wrenn.test", port, idA)
	const ask = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Protocol: tcp.wrenn\r\n"
	for name, c := range map[string]struct {
		request string
		status  int
	}{
		"CONNECT with a body":          {"CONNECT " + host + ":80 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 400},
		"CONNECT in chunks":            {"CONNECT " + host + ":80 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"CONNECT with a path":          {"CONNECT /proxy HTTP/1.1\r\nHost: " + host + "\r\n\r\n", 400},
		"CONNECT with an unknown host": {"CONNECT x-y.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		"WebSocket without a version":  {"GET / HTTP/1.1\r\nHost: " + host + "\r\n" + ask + "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", 400},
		"WebSocket without a key":      {"GET / HTTP/1.1\r\nHost: " + host + "\r\n" + ask + "Sec-WebSocket-Version: 13\r\n\r\n", 400},
		"WebSocket of a foreign page":  {"GET / HTTP/1.1\r\nHost: " + host + "\r\nOrigin: https://evil.test\r\n" + ask + "\r\n", 403},
		"CONNECT of a foreign page":    {"CONNECT " + host + ":80 HTTP/1.1\r\nHost: x\r\nOrigin: null\r\n\r\n", 403},
		"WebSocket of the page's own":  {"GET / HTTP/1.1\r\nHost: " + host + "\r\nOrigin: https://" + host + "\r\n" + ask + "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", 101},
		"WebSocket in the path form":   {fmt.Sprintf("GET /proxy/%s/%d HTTP/1.1\r\nHost: localhost\r\n%sSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", idA, port, ask), 101},
	} {
		t.Run(name, func(t *testing.T) {
			conn := w.dial(t)
			io.WriteString(conn, c.request)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || res.StatusCode != c.status {
				t.Errorf("answer = %v, %v; want %d", res, err, c.status)
			}
			conn.Close()
		})
	}
}

func TestWebSocketsOfOtherProtocolsAreTheApplications(t *testing.T) {
	w := newWorld(t)
	conn := w.websocket(t, guest(t, websocketEcho))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn.Write(ctx, websocket.MessageText, []byte("hi"))
	if _, b, err := conn.Read(ctx); err != nil || string(b) != "hi" {
		t.Errorf("answer = %q, %v", b, err)
	}
}

func TestBytesSentRightBehindTheCONNECTArrive(t *testing.T) {
	w := newWorld(t)
	port := tcpServer(t, echoBytes)
	conn := w.dial(t)
	fmt.Fprintf(conn, "CONNECT %d-%s.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\nhello", port, idA)
	br := bufio.NewReader(conn)
	if _, err := http.ReadResponse(br, &http.Request{Method: "CONNECT"}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(br, got); err != nil || string(got) != "hello" {
		t.Errorf("echo = %q, %v", got, err)
	}
}

// upgradedGuest agrees to another protocol and then acts.
func upgradedGuest(t testing.TB, act func(c *net.TCPConn, br *bufio.Reader)) uint16 {
	return tcpServer(t, func(c *net.TCPConn) {
		br := bufio.NewReader(c)
		if _, err := http.ReadRequest(br); err != nil {
			return
		}
		io.WriteString(c, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n")
		act(c, br)
	})
}

func upgraded(t testing.TB, w *world, port uint16) end {
	t.Helper()
	conn := w.dial(t)
	fmt.Fprintf(conn, "GET / HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", port, idA)
	br := bufio.NewReader(conn)
	if res, err := http.ReadResponse(br, nil); err != nil || res.StatusCode != 101 {
		t.Fatalf("answer = %v, %v", res, err)
	}
	return &readAhead{conn, br}
}

func TestUpgradedConnectionsMayBeHalfClosed(t *testing.T) {
	t.Run("by the client", func(t *testing.T) {
		w := newWorld(t)
		c := upgraded(t, w, upgradedGuest(t, func(c *net.TCPConn, br *bufio.Reader) {
			all, err := io.ReadAll(br)
			fmt.Fprint(c, string(all), err)
		}))
		io.WriteString(c, "question ")
		c.CloseWrite()
		if answer, err := io.ReadAll(c); err != nil || string(answer) != "question <nil>" {
			t.Errorf("answer = %q, %v", answer, err)
		}
		w.waitIdle(t)
	})
	t.Run("by the application", func(t *testing.T) {
		w := newWorld(t)
		received := make(chan string, 1)
		c := upgraded(t, w, upgradedGuest(t, func(c *net.TCPConn, br *bufio.Reader) {
			io.WriteString(c, "all")
			c.CloseWrite()
			rest, err := io.ReadAll(br)
			received <- fmt.Sprint(string(rest), err)
		}))
		if said, err := io.ReadAll(c); err != nil || string(said) != "all" {
			t.Fatalf("the application said %q, %v", said, err)
		}
		io.WriteString(c, "rest ")
		c.CloseWrite()
		if got := receive(t, received); got != "rest <nil>" {
			t.Errorf("the application got %q", got)
		}
		w.waitIdle(t)
	})
}

// noise is what long transfers carry: random bytes that come again after a length
// which no buffer has.
var noise = func() []byte {
	b := make([]byte, 1<<20-3)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}()

// noiseFrom sends noise, and checks what it gets to be it.
type noiseFrom struct{ sent, got int64 }

func (n *noiseFrom) send(to io.Writer, size int64) error {
	for n.sent < size {
		at := n.sent % int64(len(noise))
		piece := noise[at:min(int64(len(noise)), at+64<<10, at+size-n.sent)]
		if _, err := to.Write(piece); err != nil {
			return err
		}
		n.sent += int64(len(piece))
	}
	return nil
}

func (n *noiseFrom) Write(b []byte) (int, error) {
	for rest := b; len(rest) > 0; {
		at := n.got % int64(len(noise))
		part := rest[:min(int64(len(rest)), int64(len(noise))-at)]
		if !bytes.Equal(part, noise[at:at+int64(len(part))]) {
			return 0, fmt.Errorf("other bytes than those that were sent, after %d", n.got)
		}
		n.got += int64(len(part))
		rest = rest[len(part):]
	}
	return len(b), nil
}

func TestLargeTransfersArriveWholeBothWaysAtOnce(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, open func(testing.TB, *world, uint16) end) {
		size := int64(64 << 20)
		if way := t.Name()[strings.Index(t.Name(), "/")+1:]; !testing.Short() && !raceDetector &&
			(strings.HasPrefix(way, "WebSocket") || strings.HasPrefix(way, "CONNECT_over")) {
			size = 1 << 30
		}
		inside := make(chan error, 2)
		c := open(t, w, tcpServer(t, func(c *net.TCPConn) {
			var n noiseFrom
			var down sync.WaitGroup
			down.Go(func() {
				inside <- n.send(c, size)
				if !strings.HasSuffix(t.Name(), "CONNECT_over_HTTP/2") { // there it would be the end of both directions
					c.CloseWrite()
				}
			})
			got, err := io.CopyBuffer(struct{ io.Writer }{&n}, struct{ io.Reader }{c}, make([]byte, 64<<10))
			if err == nil && got != size {
				err = fmt.Errorf("%d bytes came up", got)
			}
			inside <- err
			down.Wait()
		}))
		began := time.Now()
		var n noiseFrom
		var up sync.WaitGroup
		up.Go(func() {
			if err := n.send(c, size); err != nil {
				t.Errorf("send: %v", err)
			}
			c.CloseWrite()
		})
		if got, err := io.CopyBuffer(struct{ io.Writer }{&n}, struct{ io.Reader }{c}, make([]byte, 64<<10)); err != nil || got != size {
			t.Errorf("%d bytes came down, %v", got, err)
		}
		up.Wait()
		for range 2 {
			if err := <-inside; err != nil {
				t.Errorf("in the sandbox: %v", err)
			}
		}
		t.Logf("%.0f MiB/s each way", float64(size>>20)/time.Since(began).Seconds())
		c.Close()
	})
}

func TestIdleTunnelsHoldNoBuffers(t *testing.T) {
	if raceDetector {
		t.Skip("the race detector's own memory would be measured")
	}
	const count = 1000
	for name, open := range map[string]func(testing.TB, *world, uint16) end{
		"CONNECT over HTTP/1.1": connectHTTP1,
		"CONNECT over HTTP/2":   connectFrames(),
		"WebSocket":             openWebSocket,
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			port := tcpServer(t, func(c *net.TCPConn) {
				var b [1]byte
				for {
					if _, err := c.Read(b[:]); err != nil {
						return
					}
					c.Write(b[:])
				}
			})
			before := inUse()
			ends := make([]end, count)
			for i := range ends {
				ends[i] = open(t, w, port)
				ends[i].Write([]byte("x")) // so that each has carried something
				if _, err := io.ReadFull(ends[i], make([]byte, 1)); err != nil {
					t.Fatal(err)
				}
			}
			each := (inUse() - before) / count
			t.Logf("%d bytes for each of %d idle tunnels, the clients and the server in the sandbox included", each, count)
			// A buffer for one direction alone would be 64 KiB.
			if each > 48<<10 {
				t.Errorf("an idle tunnel holds %d bytes", each)
			}
			for _, c := range ends {
				c.Close()
			}
			w.waitIdle(t)
		})
	}
}

// inUse returns the memory of heap and stacks, after a collection.
func inUse() int {
	runtime.GC()
	runtime.GC() // what pools held goes with the second one
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc + m.StackInuse)
}

func TestTunnelsToProtectedPortsWantTheToken(t *testing.T) {
	w := newWorld(t)
	port := tcpServer(t, echoBytes)
	w.rule(idA, protected)
	connect := fmt.Sprintf("CONNECT %d-%s.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n", port, idA)
	if res, body, err := w.raw(t, connect+"\r\n"); err != nil || res.StatusCode != 403 {
		t.Errorf("CONNECT without the token: %v %q, %v", res, body, err)
	}
	checkEcho(t, connectAs(t, w, connect+"E2b-Traffic-Access-Token: "+token+"\r\n\r\n"))
	if res, body := do(t, w.http2, w.request(t, "CONNECT", idA, port, "", strings.NewReader("x"))); res.StatusCode != 403 {
		t.Errorf("CONNECT over HTTP/2 without the token: %v %q", res, body)
	}
	for given, want := range map[string]int{"": 403, "wrong": 403, token: 101} {
		req := w.request(t, "GET", idA, port, "/", nil)
		tunnel.Ask(req.Header)
		if given != "" {
			req.Header.Set("E2b-Traffic-Access-Token", given)
		}
		res, err := w.http1.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("WebSocket with the token %q: %s", given, res.Status)
		}
	}
}
