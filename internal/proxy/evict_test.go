package proxy_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/wrenn/wrenn/internal/proxy"
)

// kill does what happens when a sandbox is killed: first it is not found any
// more, then the proxy is told.
func (w *world) kill(id string) {
	w.sandboxes.remove(id)
	w.proxy.Evict(id)
}

func TestEvictBreaksAnswersOff(t *testing.T) {
	// Each guest sends one byte and then never again.
	for name, header := range map[string]http.Header{
		"chunked":      {},
		"known length": {"Content-Length": {"1000"}},
		"events":       {"Content-Type": {"text/event-stream"}},
	} {
		for _, version := range []string{"HTTP/1.1", "HTTP/2"} {
			t.Run(name+" over "+version, func(t *testing.T) {
				w := newWorld(t)
				left := make(chan struct{})
				port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
					for k, v := range header {
						rw.Header()[k] = v
					}
					io.WriteString(rw, "x")
					rw.(http.Flusher).Flush()
					<-r.Context().Done()
					close(left)
				})
				res, err := w.clients()[version].Do(w.request(t, "GET", idA, port, "/", nil))
				if err != nil {
					t.Fatal(err)
				}
				defer res.Body.Close()
				io.ReadFull(res.Body, make([]byte, 1))
				w.kill(idA)
				if rest, err := io.ReadAll(res.Body); err == nil {
					t.Errorf("the answer ended cleanly after %q", rest)
				}
				receive(t, left)
				w.waitIdle(t)
				res2, _ := do(t, w.http1, w.request(t, "GET", idA, port, "/health", nil))
				if res2.StatusCode != 502 {
					t.Errorf("after the kill: %s, want 502", res2.Status)
				}
			})
		}
	}
}

func TestEvictAnswersRequestsThatWait(t *testing.T) {
	w := newWorld(t)
	for name, client := range w.clients() {
		for _, method := range []string{"GET", "POST"} {
			t.Run(method+" over "+name, func(t *testing.T) {
				w.sandboxes.add(idA, "127.0.0.1")
				waiting := make(chan struct{})
				port := guest(t, func(_ http.ResponseWriter, r *http.Request) {
					close(waiting)
					// net/http watches the connection only once the body is read.
					if _, err := io.Copy(io.Discard, r.Body); err == nil {
						<-r.Context().Done()
					}
				})
				var body io.Reader
				if method == "POST" {
					half, upload := io.Pipe() // and never the other half
					defer upload.Close()
					go io.WriteString(upload, "half")
					body = half
				}
				answer := make(chan string, 1)
				req := w.request(t, method, idA, port, "/", body)
				go func() {
					res, err := client.Do(req)
					if err != nil {
						answer <- err.Error()
						return
					}
					defer res.Body.Close()
					b, err := io.ReadAll(res.Body)
					answer <- fmt.Sprint(res.StatusCode, string(b), err)
				}()
				receive(t, waiting)
				w.kill(idA)
				want := fmt.Sprint(502, `{"sandboxId":"`+idA+`","message":"The sandbox was not found","code":502}`+"\n", nil)
				if got := receive(t, answer); got != want {
					t.Errorf("answer = %s, want %s", got, want)
				}
				w.waitIdle(t)
			})
		}
	}
}

func TestEvictFreesHandlersWhoseClientDoesNotRead(t *testing.T) {
	for _, version := range []string{"HTTP/1.1", "HTTP/2"} {
		t.Run(version, func(t *testing.T) {
			w := newWorld(t)
			stalled := make(chan struct{}, 1)
			port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
				piece := make([]byte, 64<<10)
				for {
					// A write that does not get through for a while means that all
					// buffers on the way are full.
					timer := time.AfterFunc(300*time.Millisecond, func() { stalled <- struct{}{} })
					_, err := rw.Write(piece)
					timer.Stop()
					if err != nil {
						return
					}
				}
			})
			res, err := w.clients()[version].Do(w.request(t, "GET", idA, port, "/", nil))
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			receive(t, stalled)
			w.kill(idA)
			w.waitIdle(t)
			if _, err := io.Copy(io.Discard, res.Body); err == nil {
				t.Error("the answer ended cleanly")
			}
		})
	}
}

func TestEvictClosesWebSockets(t *testing.T) {
	w := newWorld(t)
	port := guest(t, websocketEcho)
	conn := w.websocket(t, port)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	conn.Write(ctx, websocket.MessageText, []byte("hi"))
	if _, _, err := conn.Read(ctx); err != nil {
		t.Fatal(err)
	}
	w.kill(idA)
	if _, _, err := conn.Read(ctx); err == nil || websocket.CloseStatus(err) != -1 || ctx.Err() != nil {
		t.Errorf("read after the kill: %v; want a broken connection", err)
	}
	w.waitIdle(t)
}

func TestEvictFreesWebSocketsWhoseClientDoesNotRead(t *testing.T) {
	w := newWorld(t)
	stalled := make(chan struct{})
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		conn, err := websocket.Accept(rw, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
		if err != nil {
			return
		}
		defer conn.CloseNow()
		piece := make([]byte, 64<<10)
		for {
			timer := time.AfterFunc(300*time.Millisecond, func() { close(stalled) })
			err := conn.Write(context.Background(), websocket.MessageBinary, piece)
			timer.Stop()
			if err != nil {
				return
			}
		}
	})
	w.websocket(t, port)
	receive(t, stalled)
	w.kill(idA)
	w.waitIdle(t)
}

func TestEvictLeavesOtherSandboxesAlone(t *testing.T) {
	w := newWorld(t)
	more := make(chan struct{})
	port := guestAt(t, "127.0.0.2:0", func(rw http.ResponseWriter, r *http.Request) {
		io.WriteString(rw, "a")
		rw.(http.Flusher).Flush()
		<-more
		io.WriteString(rw, "b")
	})
	res, err := w.http1.Do(w.request(t, "GET", idB, port, "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	w.kill(idA)
	close(more)
	if b, err := io.ReadAll(res.Body); err != nil || string(b) != "ab" {
		t.Errorf("body = %q, %v", b, err)
	}
}

// gate is a resolver that holds its answer back.
type gate struct {
	asked, open chan struct{}
}

func (g *gate) Resolve(context.Context, string) (proxy.Target, error) {
	close(g.asked)
	<-g.open
	return proxy.Target{SandboxID: idA, Addr: netip.MustParseAddr("127.0.0.1")}, nil
}

func TestSandboxEvictedWhileItIsResolvedIsNotDialled(t *testing.T) {
	g := &gate{asked: make(chan struct{}), open: make(chan struct{})}
	p := proxy.New(proxy.Config{Resolver: g, Domain: "wrenn.test", Dial: func(context.Context, string, string) (net.Conn, error) {
		t.Error("dialled an address that may be another sandbox's by now")
		return nil, net.ErrClosed
	}})
	defer p.Close()
	rec := httptest.NewRecorder()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.ServeHTTP(rec, httptest.NewRequest("GET", "http://80-"+idA+".wrenn.test/", nil))
	}()
	receive(t, g.asked)
	p.Evict(idA)
	close(g.open)
	receive(t, done)
	if rec.Code != 502 || !strings.Contains(rec.Body.String(), "not found") {
		t.Errorf("answer = %d %s", rec.Code, rec.Body)
	}
}

func TestEvictResetsConnectionsToTheGuest(t *testing.T) {
	w := newWorld(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		if c, err := ln.Accept(); err == nil {
			accepted <- c
		}
	}()
	req := w.request(t, "GET", idA, uint16(ln.Addr().(*net.TCPAddr).Port), "/", nil)
	go w.http1.Do(req)
	conn := receive(t, accepted)
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
		t.Fatal(err)
	}
	w.kill(idA)
	if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the guest's end reads %v, want a reset", err)
	}
}

func TestConnectionMadeTooLateIsClosed(t *testing.T) {
	dialling, evicted := make(chan struct{}), make(chan struct{})
	ours, theirs := net.Pipe()
	p := proxy.New(proxy.Config{
		Resolver: &sandboxes{addrs: map[string]netip.Addr{idA: netip.MustParseAddr("127.0.0.1")}},
		Domain:   "wrenn.test",
		Dial: func(context.Context, string, string) (net.Conn, error) {
			close(dialling)
			<-evicted
			return ours, nil
		},
	})
	defer p.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		p.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "http://49983-"+idA+".wrenn.test/", nil))
	}()
	receive(t, dialling)
	p.Evict(idA)
	close(evicted)
	theirs.SetDeadline(time.Now().Add(10 * time.Second))
	if b, err := io.ReadAll(theirs); err != nil || len(b) > 0 {
		t.Errorf("the connection was kept: %q, %v", b, err)
	}
	receive(t, done)
}

func TestClosedProxyRefuses(t *testing.T) {
	w := newWorld(t)
	w.proxy.Close()
	if res, _ := do(t, w.http1, w.request(t, "GET", idA, 80, "/", nil)); res.StatusCode != 503 {
		t.Errorf("answer = %s", res.Status)
	}
}

func TestGuestThatBreaksOffBreaksTheAnswerOff(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		io.WriteString(rw, "x")
		rw.(http.Flusher).Flush()
		panic(http.ErrAbortHandler)
	})
	for name, client := range w.clients() {
		res, err := client.Do(w.request(t, "GET", idA, port, "/", nil))
		if err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(res.Body); err == nil {
			t.Errorf("%s: clean end after %q", name, b)
		}
		res.Body.Close()
	}
}

func TestClientThatLeavesIsNoticedByTheGuest(t *testing.T) {
	w := newWorld(t)
	for name, client := range w.clients() {
		t.Run(name, func(t *testing.T) {
			arrived, left := make(chan struct{}), make(chan struct{})
			port := guest(t, func(_ http.ResponseWriter, r *http.Request) {
				close(arrived)
				<-r.Context().Done()
				close(left)
			})
			req := w.request(t, "GET", idA, port, "/", nil)
			ctx, cancel := context.WithCancel(req.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				if _, err := client.Do(req.WithContext(ctx)); err == nil {
					t.Error("got an answer")
				}
			}()
			receive(t, arrived)
			cancel()
			receive(t, done)
			receive(t, left)
			w.waitIdle(t)
		})
	}
}
