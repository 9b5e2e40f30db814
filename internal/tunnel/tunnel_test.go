package tunnel_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"

	"github.com/wrenn/wrenn/internal/tunnel"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tcpPair returns the two ends of a TCP connection.
func tcpPair(t testing.TB) (a, b *net.TCPConn) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	dialled, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	accepted, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []net.Conn{dialled, accepted} {
		c.SetDeadline(time.Now().Add(30 * time.Second))
		t.Cleanup(func() { c.Close() })
	}
	return dialled.(*net.TCPConn), accepted.(*net.TCPConn)
}

func pair(t testing.TB) (client, server *tunnel.Conn) {
	a, b := tcpPair(t)
	client, server = tunnel.New(a, tunnel.Config{Client: true}), tunnel.New(b, tunnel.Config{})
	t.Cleanup(func() { client.Close(); server.Close() })
	return client, server
}

func TestBothDirectionsEndApart(t *testing.T) {
	client, server := pair(t)
	for _, ends := range [][2]*tunnel.Conn{{client, server}, {server, client}} {
		go func() {
			io.WriteString(ends[0], strings.Repeat("bytes ", 50_000))
			ends[0].CloseWrite()
		}()
		got, err := io.ReadAll(ends[1])
		if err != nil || string(got) != strings.Repeat("bytes ", 50_000) {
			t.Fatalf("%d bytes came, %v", len(got), err)
		}
	}
	var ended sync.WaitGroup
	for _, c := range []*tunnel.Conn{client, server} {
		ended.Go(func() {
			if err := c.AwaitClose(); err != nil {
				t.Errorf("the tunnel ended with %v", err)
			}
		})
	}
	ended.Wait()
	if _, err := client.Write([]byte("x")); err == nil {
		t.Error("wrote after the end")
	}
}

func TestConnectionThatIsCutIsNoProperEnd(t *testing.T) {
	a, b := tcpPair(t)
	c := tunnel.New(a, tunnel.Config{Client: true})
	b.Write([]byte{0x82, 2, 'h', 'i'})
	b.Close()
	got, err := io.ReadAll(c)
	if string(got) != "hi" || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestAbortTellsWhy(t *testing.T) {
	client, server := pair(t)
	server.Abort()
	var closed *tunnel.CloseError
	if _, err := io.ReadAll(client); !errors.As(err, &closed) || closed.Code != tunnel.CodeReset {
		t.Errorf("read = %v", err)
	}
}

func TestPingsAreAnsweredWhileTheWriterIsStuck(t *testing.T) {
	a, b := tcpPair(t)
	server := tunnel.New(b, tunnel.Config{})
	defer server.Close()
	var writing sync.WaitGroup
	writing.Go(func() { server.Write(make([]byte, 64<<20)) }) // until the test ends
	defer writing.Wait()
	defer server.Close()

	// A masked ping, many times, and bytes behind them: nothing of it waits for the
	// writer.
	for range 1000 {
		a.Write([]byte{0x89, 0x81, 0, 0, 0, 0, 'p'})
	}
	a.Write([]byte{0x82, 0x82, 0, 0, 0, 0, 'h', 'i'})
	got := make([]byte, 2)
	if _, err := io.ReadFull(server, got); err != nil || string(got) != "hi" {
		t.Errorf("read %q, %v", got, err)
	}
}

func TestAnotherLibraryGetsItsPings(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if err := tunnel.Agree(r, w.Header()); err != nil {
			http.Error(w, err.Error(), 400)
			return
		}
		w.WriteHeader(101)
		conn, buf, err := w.(http.Hijacker).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		early, _ := buf.Reader.Peek(buf.Reader.Buffered())
		c := tunnel.New(conn, tunnel.Config{Early: early})
		defer c.Close()
		c.KeepAlive(10 * time.Millisecond)
		io.Copy(c, struct{ io.Reader }{c})
		c.CloseWrite()
		c.AwaitClose()
	}))
	defer srv.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	pinged := make(chan struct{}, 100)
	c, _, err := websocket.Dial(ctx, srv.URL, &websocket.DialOptions{
		Subprotocols:   []string{tunnel.Protocol},
		OnPingReceived: func(context.Context, []byte) bool { pinged <- struct{}{}; return true },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseNow()
	ended := make(chan error, 1)
	go func() {
		kind, b, err := c.Read(ctx) // answers pings, too
		if err != nil || kind != websocket.MessageText || len(b) > 0 {
			t.Errorf("the end of the other direction is %v %q, %v", kind, b, err)
		}
		_, _, err = c.Read(ctx)
		ended <- err
	}()
	for range 3 {
		if err := c.Ping(ctx); err != nil {
			t.Fatalf("ping: %v", err)
		}
		<-pinged
	}
	if err := c.Write(ctx, websocket.MessageText, nil); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; websocket.CloseStatus(err) != websocket.StatusNormalClosure {
		t.Errorf("the tunnel ended with %v", err)
	}
}

func TestClientThatClosesAtOnceIsAnswered(t *testing.T) {
	a, b := tcpPair(t)
	server := tunnel.New(b, tunnel.Config{})
	defer server.Close()
	a.Write([]byte{0x82, 0x82, 0, 0, 0, 0, 'h', 'i', 0x88, 0x80, 0, 0, 0, 0})
	if got, err := io.ReadAll(server); string(got) != "hi" || err != nil {
		t.Errorf("read %q, %v", got, err)
	}
	if err := server.AwaitClose(); err != nil {
		t.Errorf("the tunnel ended with %v", err)
	}
	if err := server.CloseWrite(); err != nil {
		t.Error(err)
	}
	if _, err := server.Write([]byte("x")); err == nil {
		t.Error("wrote to a client that wants no more")
	}
	server.Close()
	if answer, err := io.ReadAll(a); err != nil || !bytes.Equal(answer, []byte{0x88, 2, 3, 0xe8}) {
		t.Errorf("answer = %x, %v", answer, err)
	}
}

func TestWhatIsAgainstTheRulesIsRefused(t *testing.T) {
	masked := func(b ...byte) []byte { // with a key of zeros
		b[1] |= 0x80
		return append(b[:2:2], append([]byte{0, 0, 0, 0}, b[2:]...)...)
	}
	for name, c := range map[string]struct {
		sent []byte
		code uint16
	}{
		"text":                      {masked(0x81, 1, 'x'), tunnel.CodeUnsupported},
		"text in parts":             {append(masked(0x01, 0), masked(0x80, 1, 'x')...), tunnel.CodeUnsupported},
		"unmasked":                  {[]byte{0x82, 1, 'x'}, tunnel.CodeProtocolError},
		"reserved bits":             {masked(0xc2, 1, 'x'), tunnel.CodeProtocolError},
		"unknown kind":              {masked(0x83, 0), tunnel.CodeProtocolError},
		"unknown control kind":      {masked(0x8b, 0), tunnel.CodeProtocolError},
		"continuation of nothing":   {masked(0x80, 1, 'x'), tunnel.CodeProtocolError},
		"message within a message":  {append(masked(0x02, 1, 'x'), masked(0x82, 1, 'x')...), tunnel.CodeProtocolError},
		"control frame in parts":    {masked(0x09, 0), tunnel.CodeProtocolError},
		"long control frame":        {[]byte{0x89, 0xfe, 0, 126, 0, 0, 0, 0}, tunnel.CodeProtocolError},
		"half a close code":         {masked(0x88, 1, 3), tunnel.CodeProtocolError},
		"negative length":           {[]byte{0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0}, tunnel.CodeProtocolError},
		"message that is too large": {[]byte{0x82, 0xff, 0, 0, 0, 0, 0, 0x10, 0, 1, 0, 0, 0, 0}, tunnel.CodeTooLarge},
		"bytes behind the end":      {append(masked(0x81, 0), masked(0x82, 1, 'x')...), tunnel.CodeProtocolError},
	} {
		t.Run(name, func(t *testing.T) {
			a, b := tcpPair(t)
			server := tunnel.New(b, tunnel.Config{})
			a.Write(c.sent)
			a.CloseWrite()
			got, err := io.ReadAll(server)
			if err == nil {
				err = server.AwaitClose()
			}
			if err == nil || errors.Is(err, io.ErrUnexpectedEOF) || bytes.ContainsRune(got, 'x') && name != "message within a message" {
				t.Errorf("read %q, %v", got, err)
			}
			server.Close()
			answer, _ := io.ReadAll(a)
			if len(answer) < 4 || answer[0] != 0x88 || uint16(answer[2])<<8|uint16(answer[3]) != c.code {
				t.Errorf("answer = %x, want a close frame with %d", answer, c.code)
			}
		})
	}
}

func TestHandshakeOfAnotherServerIsNoTunnel(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c, err := websocket.Accept(w, r, nil)
		if err == nil {
			c.CloseNow()
		}
	}))
	defer srv.Close()
	req, err := http.NewRequest("GET", srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	key := tunnel.Ask(req.Header)
	if !tunnel.Asked(req) {
		t.Error("what Ask makes does not ask")
	}
	res, err := srv.Client().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if err := tunnel.Check(res, key); err == nil {
		t.Error("a WebSocket without the subprotocol passed for a tunnel")
	}
}

// pieces gives what it has in pieces of one size.
type pieces struct {
	io.Writer
	data []byte
	size int
}

func (p *pieces) Read(b []byte) (int, error) {
	n := copy(b, p.data[:min(p.size, len(p.data))])
	if p.data = p.data[n:]; n == 0 {
		return 0, io.EOF
	}
	return n, nil
}
func (p *pieces) Close() error { return nil }

// FuzzFramesInPieces checks that what comes does not depend on how it is cut up.
func FuzzFramesInPieces(f *testing.F) {
	f.Add([]byte{0x82, 2, 'h', 'i', 0x89, 1, 'p', 0x81, 0, 0x88, 2, 3, 0xe8}, 1)
	f.Add([]byte{0x02, 1, 'h', 0x8a, 0, 0x80, 1, 'i', 0x82, 126, 0, 3, 'a', 'b', 'c'}, 3)
	f.Fuzz(func(t *testing.T, data []byte, size int) {
		read := func(size int) (string, string) {
			c := tunnel.New(&pieces{io.Discard, data, size}, tunnel.Config{Client: true})
			defer c.Close()
			got, err := io.ReadAll(c)
			if err == nil {
				err = c.AwaitClose()
			}
			if err == nil {
				return string(got), ""
			}
			return string(got), err.Error()
		}
		whole, err := read(len(data) + 1)
		parts, err2 := read(1 + int(uint(size)%17))
		if whole != parts || err != err2 {
			t.Errorf("whole: %q, %s; in pieces: %q, %s", whole, err, parts, err2)
		}
	})
}
