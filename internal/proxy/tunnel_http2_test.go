package proxy_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/wrenn/wrenn/internal/tunnel"
)

// frames is the client's side of an HTTP/2 connection, frame by frame, for what Go's
// client does not show or hides behind its buffers.
type frames struct {
	conn    net.Conn
	framer  *http2.Framer
	streams int // opened
}

func dialFrames(t testing.TB, w *world) *frames {
	t.Helper()
	f := &frames{conn: w.dial(t)}
	io.WriteString(f.conn, http2.ClientPreface)
	f.framer = http2.NewFramer(f.conn, f.conn)
	f.framer.WriteSettings()
	return f
}

// connect asks for a tunnel on a stream of its own.
func (f *frames) connect(port uint16) uint32 {
	id := uint32(2*f.streams + 1)
	f.streams++
	var block bytes.Buffer
	h := hpack.NewEncoder(&block)
	h.WriteField(hpack.HeaderField{Name: ":method", Value: "CONNECT"})
	h.WriteField(hpack.HeaderField{Name: ":authority", Value: fmt.Sprintf("%d-%s.wrenn.test:80", port, idA)})
	f.framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true})
	return id
}

// next returns the next frame of a stream; it holds until the one after it.
func (f *frames) next(stream uint32) (http2.Frame, error) {
	for {
		frame, err := f.framer.ReadFrame()
		if err != nil {
			return nil, err
		}
		switch frame := frame.(type) {
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				f.framer.WriteSettingsAck()
			}
		case *http2.DataFrame, *http2.HeadersFrame, *http2.RSTStreamFrame:
			if frame.Header().StreamID == stream {
				return frame, nil
			}
		}
	}
}

// openWebSocketHTTP2 opens a tunnel over a WebSocket on an HTTP/2 stream.
func openWebSocketHTTP2(t testing.TB, w *world, port uint16) end {
	t.Helper()
	res, upload := w.connect(t, port, http.Header{"Sec-Websocket-Protocol": {tunnel.Protocol}})
	if res.StatusCode != 200 || res.Header.Get("Sec-WebSocket-Protocol") != tunnel.Protocol {
		t.Fatalf("answer = %v", res)
	}
	c := tunnel.New(&streamEnd{res.Body, upload.(*io.PipeWriter)}, tunnel.Config{Client: true})
	t.Cleanup(func() { c.Close() })
	return c
}

// framesEnd is a tunnel on a stream.
type framesEnd struct {
	*frames
	stream uint32
}

func (e *framesEnd) Write(b []byte) (int, error) {
	return len(b), e.framer.WriteData(e.stream, false, b)
}

func (e *framesEnd) Read(b []byte) (int, error) {
	for {
		frame, err := e.next(e.stream)
		if err != nil {
			return 0, err
		}
		switch frame := frame.(type) {
		case *http2.DataFrame:
			if len(frame.Data()) > 0 {
				return copy(b, frame.Data()), nil
			}
			if frame.StreamEnded() {
				return 0, io.EOF
			}
		case *http2.RSTStreamFrame:
			return 0, http2.StreamError{StreamID: e.stream, Code: frame.ErrCode}
		}
	}
}

func (e *framesEnd) CloseWrite() error { return e.framer.WriteData(e.stream, true, nil) }
func (e *framesEnd) Close() error      { return e.framer.WriteRSTStream(e.stream, http2.ErrCodeCancel) }

// connectFrames opens tunnels, some hundred on each connection.
func connectFrames() func(t testing.TB, w *world, port uint16) end {
	var f *frames
	return func(t testing.TB, w *world, port uint16) end {
		if f == nil || f.streams == 200 {
			f = dialFrames(t, w)
		}
		return &framesEnd{f, f.connect(port)}
	}
}

func TestTunnelsOverHTTP2EndAsRFC9113Says(t *testing.T) {
	for name, c := range map[string]struct {
		serve func(c *net.TCPConn)
		ended bool // END_STREAM
		code  http2.ErrCode
	}{
		"the server closes": {func(c *net.TCPConn) { io.WriteString(c, "x") }, true, http2.ErrCodeNo},
		"the server resets": {func(c *net.TCPConn) {
			io.WriteString(c, "x")
			io.ReadFull(c, make([]byte, 1))
			c.SetLinger(0)
		}, false, http2.ErrCodeInternal},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			f := dialFrames(t, w)
			f.conn.SetDeadline(time.Now().Add(10 * time.Second))
			e := &framesEnd{f, f.connect(tcpServer(t, c.serve))}
			if _, err := io.ReadFull(e, make([]byte, 1)); err != nil {
				t.Fatal(err)
			}
			if !c.ended {
				e.Write([]byte("x"))
			}
			rest, err := io.ReadAll(e)
			if (err == nil) != c.ended || len(rest) > 0 {
				t.Errorf("the stream ended with %q, %v", rest, err)
			}
			if c.ended {
				_, err = e.Read(make([]byte, 1)) // the client has not ended its direction: it is told that nobody listens
			}
			var reset http2.StreamError
			if !errors.As(err, &reset) || reset.Code != c.code {
				t.Errorf("the stream was reset with %v, want %v", err, c.code)
			}
			w.waitIdle(t)
		})
	}
}
