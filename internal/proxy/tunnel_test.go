package proxy_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/wrenn/wrenn/internal/tunnel"
)

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
