package envd

import (
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"
)

// guarded starts a server that limits its connections, as that of pid 1 does, on a
// loopback address: all connections are from inside.
func guarded(t *testing.T, mostInside int) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d := newDoor(l, mostInside, 1)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "hello") })}
	ended := make(chan struct{}, 2)
	go func() { _ = server.Serve(&d.in); ended <- struct{}{} }()
	go func() { _, _ = d.Accept(); ended <- struct{}{} }()
	t.Cleanup(func() {
		server.Close()
		l.Close()
		<-ended
		<-ended
	})
	return l.Addr().String()
}

func TestConnectionsFromInsideThatAreTooManyAreClosedAndTheOthersServed(t *testing.T) {
	const most = 8
	address := guarded(t, most)
	var open []net.Conn
	for range most {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		open = append(open, conn)
	}
	for range 3 * most {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			continue // reset that soon
		}
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Read(make([]byte, 1)); err == nil || err.(net.Error).Timeout() {
			t.Fatalf("a connection too many: %v; want it closed", err)
		}
		conn.Close()
	}
	for i, conn := range open {
		if got := ask(conn); got != http.StatusOK {
			t.Errorf("connection %d answers %d", i, got)
		}
		conn.Close()
	}
	// Each that was closed has given its place back.
	deadline := time.Now().Add(10 * time.Second)
	for range most {
		for {
			conn, err := net.Dial("tcp", address)
			if err == nil && ask(conn) == http.StatusOK {
				defer conn.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("no place is free after all were left")
			}
		}
	}
}

func ask(conn net.Conn) int {
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	client := &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}}
	resp, err := client.Get("http://agent/")
	if err != nil {
		return 0
	}
	resp.Body.Close()
	return resp.StatusCode
}

func TestProgramsInsideMayNotInitializeASandboxWithoutAToken(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: New(Config{}).handler}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = serveApart(server, l)
	}()
	defer func() {
		server.Close()
		<-ended
	}()
	for _, body := range []string{`{"accessToken":"stolen"}`, ""} {
		resp, err := http.Post("http://"+l.Addr().String()+"/init", "application/json", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("init with %q: got %d", body, resp.StatusCode)
		}
	}
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if got := ask(conn); got != http.StatusNotFound { // and is served otherwise
		t.Errorf("without a token it answers %d", got)
	}
}

// peer is a connection with addresses to choose.
type peer struct {
	net.Conn
	local, remote string
}

func (p peer) LocalAddr() net.Addr  { return addr(p.local) }
func (p peer) RemoteAddr() net.Addr { return addr(p.remote) }

func addr(ip string) net.Addr { return &net.TCPAddr{IP: net.ParseIP(ip), Port: 1} }

func TestConnectionsAreKnownByWhereTheyComeFrom(t *testing.T) {
	for _, c := range []struct {
		local, remote string
		inside        bool
	}{
		{"127.0.0.1", "127.0.0.1", true},
		{"127.0.0.1", "127.3.2.1", true},
		{"::1", "::1", true},
		{"169.254.0.21", "169.254.0.21", true},
		{"::ffff:169.254.0.21", "169.254.0.21", true},
		{"169.254.0.21", "169.254.0.22", false},
	} {
		if got := fromInside(peer{local: c.local, remote: c.remote}); got != c.inside {
			t.Errorf("from %s to %s: inside is %v", c.remote, c.local, got)
		}
	}
}
