package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
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
