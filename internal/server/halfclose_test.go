package server_test

import (
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/server"
)

// halfClosers are requests of clients that say that they send no further one.
func halfClosers(host string) map[string]string {
	port, _, _ := strings.Cut(host, "-")
	path := "/proxy/" + id + "/" + port + "/"
	return map[string]string{
		"HTTP/1.0":                    "GET " + path + " HTTP/1.0\r\n\r\n",
		"HTTP/1.0 with a host":        "GET " + path + " HTTP/1.0\r\nHost: localhost\r\n\r\n",
		"HTTP/1.0 with a body":        "POST " + path + " HTTP/1.0\r\nContent-Length: 4\r\n\r\nbody",
		"Connection: close":           "GET " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
		"Connection: close, a body":   "POST " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbody",
		"Connection: close, chunks":   "POST " + path + " HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
		"Connection: close, the API":  "GET /api HTTP/1.1\r\nHost: api.wrenn.test\r\nConnection: close\r\n\r\n",
		"Connection: close, API post": "POST /api HTTP/1.1\r\nHost: api.wrenn.test\r\nConnection: close\r\nContent-Length: 4\r\n\r\nbody",
	}
}

// slow is a handler that answers when it is told to, and tells when its client is
// taken to have gone.
func slow(arrived chan<- struct{}, goOn <-chan struct{}, gone chan<- struct{}) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		arrived <- struct{}{}
		select {
		case <-goOn:
			w.Header().Set("Content-Length", "7000")
			io.WriteString(w, strings.Repeat("answer ", 1000))
		case <-r.Context().Done():
			gone <- struct{}{}
		}
	}
}

func TestClientThatHasEndedItsDirectionGetsItsAnswer(t *testing.T) {
	arrived, goOn, gone := make(chan struct{}, 1), make(chan struct{}), make(chan struct{}, 1)
	h := slow(arrived, goOn, gone)
	certFile, keyFile, roots := writeCertificate(t, t.TempDir(), "wrenn.test")
	certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		t.Fatal(err)
	}
	p := start(t, server.Config{API: h}, &tls.Config{Certificates: []tls.Certificate{certificate}})
	for name, request := range halfClosers(guest(t, h)) {
		for _, overTLS := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, TLS %t", name, overTLS), func(t *testing.T) {
				conn := dialPlain(t, p.plain)
				if overTLS {
					conn = dialTLS(t, p.tls, &tls.Config{RootCAs: roots, ServerName: "wrenn.test"})
				}
				io.WriteString(conn, request)
				conn.CloseWrite()
				receive(t, arrived)
				select {
				case <-gone:
					t.Fatal("the client was taken to have gone")
				case <-time.After(100 * time.Millisecond): // longer than it takes to look
				}
				goOn <- struct{}{}
				answer, err := io.ReadAll(conn)
				if err != nil || strings.Count(string(answer), "answer ") != 1000 {
					t.Errorf("%d bytes came, %v", len(answer), err)
				}
			})
		}
	}
}

func TestClientThatResetsIsNoticedAfterItHasEndedItsDirection(t *testing.T) {
	arrived, gone := make(chan struct{}, 1), make(chan struct{}, 1)
	h := slow(arrived, nil, gone)
	p := start(t, server.Config{API: h}, nil)
	for name, request := range halfClosers(guest(t, h)) {
		if strings.HasPrefix(request, "GET /proxy") && !strings.HasSuffix(name, "HTTP/1.0") {
			continue // served without net/http, and noticed by the first byte of the answer
		}
		t.Run(name, func(t *testing.T) {
			conn := dialPlain(t, p.plain).(*net.TCPConn)
			io.WriteString(conn, request)
			conn.CloseWrite()
			receive(t, arrived)
			conn.SetLinger(0)
			conn.Close()
			receive(t, gone)
		})
	}
}

func TestClientThatGoesOnIsGoneWithTheEndOfItsDirection(t *testing.T) {
	arrived, gone := make(chan struct{}, 1), make(chan struct{}, 1)
	p := start(t, server.Config{API: slow(arrived, nil, gone)}, nil)
	conn := dialPlain(t, p.plain)
	io.WriteString(conn, "POST /api HTTP/1.1\r\nHost: api.wrenn.test\r\nContent-Length: 4\r\n\r\nbody")
	receive(t, arrived)
	conn.CloseWrite()
	receive(t, gone)
}

type halfConn interface {
	net.Conn
	CloseWrite() error
}

func dialPlain(t *testing.T, addr string) halfConn {
	t.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

func dialTLS(t *testing.T, addr string, config *tls.Config) halfConn {
	t.Helper()
	c, err := tls.Dial("tcp", addr, config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c
}
