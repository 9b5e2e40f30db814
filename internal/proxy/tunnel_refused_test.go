package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/wrenn/wrenn/internal/tunnel"
)

func TestTunnelToAClosedPortIsRefusedBeforeItOpens(t *testing.T) {
	w := newWorld(t)
	port := closedPort(t)
	closed := fmt.Sprintf(`{"sandboxId":"%s","message":"The sandbox is running but port is not open","port":%d,"code":502}`+"\n", idA, port)
	unknown := strings.Repeat("z", 20)
	gone := `{"sandboxId":"` + unknown + `","message":"The sandbox was not found","code":502}` + "\n"
	for _, c := range []struct{ name, id, want string }{{"closed port", idA, closed}, {"unknown sandbox", unknown, gone}} {
		t.Run(c.name+", CONNECT", func(t *testing.T) {
			res, body, err := w.raw(t, fmt.Sprintf("CONNECT %d-%s.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\n", port, c.id))
			if err != nil || res.StatusCode != 502 || body != c.want || !res.Close {
				t.Errorf("answer = %v %q, %v", res, body, err)
			}
		})
		t.Run(c.name+", CONNECT over HTTP/2", func(t *testing.T) {
			res, body := do(t, w.http2, w.request(t, "CONNECT", c.id, port, "", strings.NewReader("x")))
			if res.StatusCode != 502 || body != c.want {
				t.Errorf("answer = %v %q", res, body)
			}
		})
		t.Run(c.name+", WebSocket", func(t *testing.T) {
			req := w.request(t, "GET", c.id, port, "/", nil)
			tunnel.Ask(req.Header)
			if res, body := do(t, w.http1, req); res.StatusCode != 502 || body != c.want {
				t.Errorf("answer = %v %q", res, body)
			}
		})
	}
}

func TestNoTunnelLeadsToTheGuestAgent(t *testing.T) {
	w := newWorld(t)
	guestAt(t, "127.0.0.1:49983", func(http.ResponseWriter, *http.Request) { t.Error("the guest agent was reached") })
	for _, port := range []uint16{49983, 49984} {
		res, body, err := w.raw(t, fmt.Sprintf("CONNECT %d-%s.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\nGET /init HTTP/1.1\r\nHost: x\r\n\r\n", port, idA))
		if err != nil || res.StatusCode != 403 || !res.Close {
			t.Errorf("CONNECT to %d: %v %q, %v", port, res, body, err)
		}
		if res, body := do(t, w.http2, w.request(t, "CONNECT", idA, port, "", strings.NewReader("GET /init"))); res.StatusCode != 403 {
			t.Errorf("CONNECT over HTTP/2 to %d: %v %q", port, res, body)
		}
		req := w.request(t, "GET", idA, port, "/", nil)
		tunnel.Ask(req.Header)
		if res, body := do(t, w.http1, req); res.StatusCode != 403 {
			t.Errorf("WebSocket to %d: %v %q", port, res, body)
		}
	}
}

func TestTunnelsThatAreAskedForWronglyAreRefused(t *testing.T) {
	w := newWorld(t)
	port := tcpServer(t, echoBytes)
	host := fmt.Sprintf("%d-%s.wrenn.test", port, idA)
	const ask = "Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Protocol: tcp.wrenn\r\n"
	for name, c := range map[string]struct {
		request string
		status  int
	}{
		"CONNECT with a body":          {"CONNECT " + host + ":80 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", 400},
		"CONNECT in chunks":            {"CONNECT " + host + ":80 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400},
		"CONNECT with a path":          {"CONNECT /proxy HTTP/1.1\r\nHost: " + host + "\r\n\r\n", 400},
		"CONNECT with an unknown host": {"CONNECT x-y.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\n", 400},
		"WebSocket without a version":  {"GET / HTTP/1.1\r\nHost: " + host + "\r\n" + ask + "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", 400},
		"WebSocket without a key":      {"GET / HTTP/1.1\r\nHost: " + host + "\r\n" + ask + "Sec-WebSocket-Version: 13\r\n\r\n", 400},
		"WebSocket of a foreign page":  {"GET / HTTP/1.1\r\nHost: " + host + "\r\nOrigin: https://evil.test\r\n" + ask + "\r\n", 403},
		"CONNECT of a foreign page":    {"CONNECT " + host + ":80 HTTP/1.1\r\nHost: x\r\nOrigin: null\r\n\r\n", 403},
		"WebSocket of the page's own":  {"GET / HTTP/1.1\r\nHost: " + host + "\r\nOrigin: https://" + host + "\r\n" + ask + "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", 101},
		"WebSocket in the path form":   {fmt.Sprintf("GET /proxy/%s/%d HTTP/1.1\r\nHost: localhost\r\n%sSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n", idA, port, ask), 101},
	} {
		t.Run(name, func(t *testing.T) {
			conn := w.dial(t)
			io.WriteString(conn, c.request)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err != nil || res.StatusCode != c.status {
				t.Errorf("answer = %v, %v; want %d", res, err, c.status)
			}
			conn.Close()
		})
	}
}

func TestWebSocketsOfOtherProtocolsAreTheApplications(t *testing.T) {
	w := newWorld(t)
	conn := w.websocket(t, guest(t, websocketEcho))
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn.Write(ctx, websocket.MessageText, []byte("hi"))
	if _, b, err := conn.Read(ctx); err != nil || string(b) != "hi" {
		t.Errorf("answer = %q, %v", b, err)
	}
}

func TestBytesSentRightBehindTheCONNECTArrive(t *testing.T) {
	w := newWorld(t)
	port := tcpServer(t, echoBytes)
	conn := w.dial(t)
	fmt.Fprintf(conn, "CONNECT %d-%s.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n\r\nhello", port, idA)
	br := bufio.NewReader(conn)
	if _, err := http.ReadResponse(br, &http.Request{Method: "CONNECT"}); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 5)
	if _, err := io.ReadFull(br, got); err != nil || string(got) != "hello" {
		t.Errorf("echo = %q, %v", got, err)
	}
}

func TestTunnelsToProtectedPortsWantTheToken(t *testing.T) {
	w := newWorld(t)
	port := tcpServer(t, echoBytes)
	w.rule(idA, protected)
	connect := fmt.Sprintf("CONNECT %d-%s.wrenn.test:80 HTTP/1.1\r\nHost: x\r\n", port, idA)
	if res, body, err := w.raw(t, connect+"\r\n"); err != nil || res.StatusCode != 403 {
		t.Errorf("CONNECT without the token: %v %q, %v", res, body, err)
	}
	checkEcho(t, connectAs(t, w, connect+"E2b-Traffic-Access-Token: "+token+"\r\n\r\n"))
	if res, body := do(t, w.http2, w.request(t, "CONNECT", idA, port, "", strings.NewReader("x"))); res.StatusCode != 403 {
		t.Errorf("CONNECT over HTTP/2 without the token: %v %q", res, body)
	}
	for given, want := range map[string]int{"": 403, "wrong": 403, token: 101} {
		req := w.request(t, "GET", idA, port, "/", nil)
		tunnel.Ask(req.Header)
		if given != "" {
			req.Header.Set("E2b-Traffic-Access-Token", given)
		}
		res, err := w.http1.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != want {
			t.Errorf("WebSocket with the token %q: %s", given, res.Status)
		}
	}
}
