package proxy_test

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
)

// mute accepts connections, sends what it is told to and is never heard of again,
// like a guest whose network is gone.
func mute(t testing.TB, sends string) (uint16, <-chan struct{}) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan struct{}, 10)
	conns := make(chan net.Conn, 10)
	go func() {
		defer close(conns)
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			io.WriteString(c, sends)
			conns <- c
			accepted <- struct{}{}
		}
	}()
	t.Cleanup(func() {
		ln.Close()
		for c := range conns {
			c.Close()
		}
	})
	return uint16(ln.Addr().(*net.TCPAddr).Port), accepted
}

func TestEvictFreesStreamsOfAGuestThatIsNeverHeardOfAgain(t *testing.T) {
	for name, sends := range map[string]string{
		"before the header": "",
		"in the header":     "HTTP/1.1 200 OK\r\nContent-",
		"in the body":       "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",
		"after an upgrade":  "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			port, accepted := mute(t, sends)
			clean := make(chan bool, 1)
			req := w.request(t, "GET", idA, port, "/", nil)
			req.Header.Set("Connection", "upgrade")
			req.Header.Set("Upgrade", "x")
			go func() {
				res, err := w.http1.Do(req)
				if err != nil {
					clean <- false
					return
				}
				defer res.Body.Close()
				_, err = io.ReadAll(res.Body)
				clean <- err == nil && res.StatusCode == 200
			}()
			receive(t, accepted)
			w.kill(idA)
			if receive(t, clean) {
				t.Error("the client saw a good answer")
			}
			w.waitIdle(t)
		})
	}
}

func TestEvictClosesIdleConnections(t *testing.T) {
	w := newWorld(t)
	// The guest agent's port: its connections are kept longer than the test waits.
	port, states := guestWithStates(t, "127.0.0.2:49983")
	do(t, w.http1, w.request(t, "GET", idB, port, "/", nil))
	for s := http.StateNew; s != http.StateIdle; {
		s = receive(t, states)
	}
	w.kill(idB)
	if s := receive(t, states); s != http.StateClosed {
		t.Errorf("connection became %s", s)
	}
}

func TestConnectionsToTheGuestAreReused(t *testing.T) {
	w := newWorld(t)
	port, states := guestWithStates(t, "127.0.0.1:0")
	opened := 0
	for range 3 {
		do(t, w.http1, w.request(t, "GET", idA, port, "/", nil))
		for s := receive(t, states); s != http.StateIdle; s = receive(t, states) {
			if s == http.StateNew {
				opened++
			}
		}
	}
	if opened != 1 {
		t.Errorf("%d connections for three requests in a row", opened)
	}
}

// guestWithStates is a guest that tells what becomes of its connections.
func guestWithStates(t testing.TB, addr string) (uint16, <-chan http.ConnState) {
	states := make(chan http.ConnState, 100)
	ln, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	srv.Listener.Close()
	srv.Listener = ln
	srv.Config.ConnState = func(_ net.Conn, s http.ConnState) { states <- s }
	srv.Start()
	t.Cleanup(srv.Close)
	return uint16(srv.Listener.Addr().(*net.TCPAddr).Port), states
}
