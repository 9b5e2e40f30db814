package proxy_test

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"
)

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
			if each > 56<<10 {
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
