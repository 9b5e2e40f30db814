package proxy_test

import (
	"fmt"
	"io"
	"net"
	"testing"
)

// benchWays are those that clients use, and a connection without the proxy.
var benchWays = []struct {
	name string
	open func(testing.TB, *world, uint16) end
}{
	{"direct", func(t testing.TB, _ *world, port uint16) end {
		c, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		return c.(*net.TCPConn)
	}},
	{"CONNECT", connectHTTP1},
	{"CONNECT-HTTP2", connectHTTP2},
	{"WebSocket", openWebSocket},
}

// BenchmarkTunnelDownload and BenchmarkTunnelUpload compare the bytes per second of
// a tunnel with those of a direct connection.
func BenchmarkTunnelDownload(b *testing.B) {
	for _, way := range benchWays {
		b.Run(way.name, func(b *testing.B) {
			w := newWorld(b)
			c := way.open(b, w, tcpServer(b, func(c *net.TCPConn) {
				for err := error(nil); err == nil; {
					_, err = c.Write(noise)
				}
			}))
			buf := make([]byte, 64<<10)
			b.SetBytes(1 << 20)
			for b.Loop() {
				if _, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, io.LimitReader(c, 1<<20), buf); err != nil {
					b.Fatal(err)
				}
			}
			c.Close()
		})
	}
}

func BenchmarkTunnelUpload(b *testing.B) {
	for _, way := range benchWays {
		b.Run(way.name, func(b *testing.B) {
			w := newWorld(b)
			c := way.open(b, w, tcpServer(b, func(c *net.TCPConn) {
				io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{c}, make([]byte, 64<<10))
			}))
			b.SetBytes(1 << 20)
			piece := make([]byte, 64<<10)
			for b.Loop() {
				for range 16 {
					if _, err := c.Write(piece); err != nil {
						b.Fatal(err)
					}
				}
			}
			c.Close()
		})
	}
}

// BenchmarkTunnelRoundTrip is a byte there and back.
func BenchmarkTunnelRoundTrip(b *testing.B) {
	for _, way := range benchWays {
		b.Run(way.name, func(b *testing.B) {
			w := newWorld(b)
			c := way.open(b, w, tcpServer(b, echoBytes))
			var one [1]byte
			for b.Loop() {
				c.Write(one[:])
				if _, err := io.ReadFull(c, one[:]); err != nil {
					b.Fatal(err)
				}
			}
			c.Close()
		})
	}
}
