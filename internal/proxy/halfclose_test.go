package proxy_test

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"testing"
)

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
