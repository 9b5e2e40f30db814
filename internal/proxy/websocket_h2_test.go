package proxy_test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/coder/websocket"
	"golang.org/x/net/http2"
)

// connect opens a WebSocket over HTTP/2 as RFC 8441 says.
//
//nolint:staticcheck // net/http's own client lets no pseudo-header through
func (w *world) connect(t testing.TB, port uint16, header http.Header) (*http.Response, io.WriteCloser) {
	t.Helper()
	body, upload := io.Pipe()
	t.Cleanup(func() { upload.Close() })
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, "CONNECT", w.url+"/ws?x=1", body)
	if err != nil {
		t.Fatal(err)
	}
	req.Host = fmt.Sprintf("%d-%s.wrenn.test", port, idA)
	req.Header = header.Clone()
	req.Header[":protocol"] = []string{"websocket"}
	req.Header.Set("Sec-WebSocket-Version", "13")
	// net/http's client lets no ":protocol" through.
	client := &http2.Transport{AllowHTTP: true, DialTLSContext: func(ctx context.Context, network, _ string, _ *tls.Config) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, w.addr)
	}}
	t.Cleanup(client.CloseIdleConnections)
	res, err := client.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { res.Body.Close() })
	return res, upload
}

// frame is a masked text frame with a payload of less than 126 bytes.
func frame(text string) []byte {
	f := []byte{0x81, 0x80 | byte(len(text)), 1, 2, 3, 4}
	for i, b := range []byte(text) {
		f = append(f, b^byte(i%4+1))
	}
	return f
}

func TestWebSocketPassesOverHTTP2(t *testing.T) {
	w := newWorld(t)
	left := make(chan struct{})
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		defer close(left)
		if r.Method != "GET" || r.RequestURI != "/ws?x=1" || r.ProtoMajor != 1 {
			t.Errorf("guest got %s %s %s", r.Method, r.RequestURI, r.Proto)
		}
		websocketEcho(rw, r)
	})
	res, upload := w.connect(t, port, http.Header{"Sec-Websocket-Protocol": {"chat"}})
	if res.StatusCode != 200 || res.Header.Get("Sec-WebSocket-Protocol") != "chat" || res.Header.Get("Sec-WebSocket-Accept") != "" || res.Header.Get("Upgrade") != "" {
		t.Fatalf("answer = %s %v", res.Status, res.Header)
	}
	in := bufio.NewReader(res.Body)
	for _, text := range []string{"hello", "", "again"} {
		upload.Write(frame(text))
		want := append([]byte{0x81, byte(len(text))}, text...)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(in, got); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("%q came back as %q, %v", text, got, err)
		}
	}
	upload.Write([]byte{0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8}) // close, 1000
	if rest, err := io.ReadAll(in); err != nil || !bytes.Equal(rest, []byte{0x88, 2, 0x03, 0xe8}) {
		t.Errorf("end = %q, %v", rest, err)
	}
	receive(t, left)
	w.waitIdle(t)
}

func TestRefusedWebSocketOverHTTP2GetsTheAnswer(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) { http.Error(rw, "not you", http.StatusForbidden) })
	res, _ := w.connect(t, port, http.Header{})
	if b, err := io.ReadAll(res.Body); res.StatusCode != 403 || string(b) != "not you\n" || err != nil {
		t.Errorf("answer = %s %q %v", res.Status, b, err)
	}
	res, _ = w.connect(t, 49983, http.Header{})
	if res.StatusCode < 400 {
		t.Errorf("the guest agent was switched to something else: %s", res.Status)
	}
}

func TestEvictEndsWebSocketsOverHTTP2(t *testing.T) {
	w := newWorld(t)
	port := guest(t, websocketEcho)
	res, upload := w.connect(t, port, http.Header{})
	upload.Write(frame("x"))
	io.ReadFull(res.Body, make([]byte, 3))
	w.kill(idA)
	if rest, err := io.ReadAll(res.Body); err == nil {
		t.Errorf("a clean end after %q", rest)
	}
	w.waitIdle(t)
}

func TestClientThatLeavesItsWebSocketOverHTTP2IsNoticed(t *testing.T) {
	w := newWorld(t)
	left := make(chan error, 1)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		conn, err := websocket.Accept(rw, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.CloseNow()
		_, _, err = conn.Read(context.Background())
		left <- err
	})
	res, _ := w.connect(t, port, http.Header{})
	res.Body.Close()
	if err := receive(t, left); err == nil {
		t.Error("the guest read a message")
	}
	w.waitIdle(t)
}
