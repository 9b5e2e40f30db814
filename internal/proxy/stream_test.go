package proxy_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

func TestEventsArriveOneByOne(t *testing.T) {
	w := newWorld(t)
	next := make(chan string)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Type", "text/event-stream")
		rw.(http.Flusher).Flush()
		for event := <-next; event != ""; event = <-next {
			fmt.Fprintf(rw, "data: %s\n", event)
			rw.(http.Flusher).Flush()
		}
	})
	for name, client := range w.clients() {
		t.Run(name, func(t *testing.T) {
			// Do returns although there is no byte of the body yet.
			res, err := client.Do(w.request(t, "GET", idA, port, "/", nil))
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			lines := bufio.NewReader(res.Body)
			for i := range 3 {
				next <- fmt.Sprint(i) // only after the one before has been read
				line, err := lines.ReadString('\n')
				if err != nil || line != fmt.Sprintf("data: %d\n", i) {
					t.Fatalf("event %d = %q, %v", i, line, err)
				}
			}
			next <- "" // the end
			if rest, err := io.ReadAll(lines); err != nil || len(rest) > 0 {
				t.Errorf("end = %q, %v", rest, err)
			}
		})
	}
}

func TestBodyOfKnownLengthIsNotHeldBack(t *testing.T) {
	w := newWorld(t)
	rest := make(chan struct{})
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Content-Length", "2")
		io.WriteString(rw, "a")
		rw.(http.Flusher).Flush()
		<-rest
		io.WriteString(rw, "b")
	})
	res, err := w.http1.Do(w.request(t, "GET", idA, port, "/", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	first := make([]byte, 1)
	if _, err := io.ReadFull(res.Body, first); err != nil {
		t.Fatal(err)
	}
	close(rest)
	if b, err := io.ReadAll(res.Body); err != nil || string(b) != "b" {
		t.Errorf("rest = %q, %v", b, err)
	}
}

// echo answers while it reads.
func echo(rw http.ResponseWriter, r *http.Request) {
	rc := http.NewResponseController(rw)
	_ = rc.EnableFullDuplex()
	rw.WriteHeader(200)
	rc.Flush()
	buf := make([]byte, 4096)
	for {
		n, err := r.Body.Read(buf)
		rw.Write(buf[:n])
		rc.Flush()
		if err != nil {
			return
		}
	}
}

func TestUploadAndAnswerStreamAtTheSameTime(t *testing.T) {
	w := newWorld(t)
	port := guest(t, echo)
	for name, client := range w.clients() {
		t.Run(name, func(t *testing.T) {
			body, upload := io.Pipe()
			res, err := client.Do(w.request(t, "POST", idA, port, "/", body))
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			for i := range 5 {
				sent := strings.Repeat(fmt.Sprint(i), 100)
				io.WriteString(upload, sent)
				got := make([]byte, len(sent))
				if _, err := io.ReadFull(res.Body, got); err != nil || string(got) != sent {
					t.Fatalf("piece %d came back as %q, %v", i, got, err)
				}
			}
			upload.Close()
			if rest, err := io.ReadAll(res.Body); err != nil || len(rest) > 0 {
				t.Errorf("end = %q, %v", rest, err)
			}
		})
	}
}

func TestTrailersPassBothWays(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Trailer", "Announced")
		io.Copy(io.Discard, r.Body)
		io.WriteString(rw, "x")
		rw.Header().Set("Announced", r.Trailer.Get("Sum"))
		rw.Header().Set(http.TrailerPrefix+"Late", "too")
	})
	for name, client := range w.clients() {
		t.Run(name, func(t *testing.T) {
			req := w.request(t, "POST", idA, port, "/", io.MultiReader(strings.NewReader("body"))) // length unknown
			req.Trailer = http.Header{"Sum": {"42"}}
			res, _ := do(t, client, req)
			if res.Trailer.Get("Announced") != "42" || res.Trailer.Get("Late") != "too" {
				t.Errorf("trailers = %v", res.Trailer)
			}
		})
	}
}

func TestInformationalAnswersPass(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		rw.Header().Set("Link", "</style.css>; rel=preload")
		rw.WriteHeader(http.StatusEarlyHints)
		rw.WriteHeader(http.StatusOK)
	})
	for name, client := range w.clients() {
		t.Run(name, func(t *testing.T) {
			var hints []string
			req := w.request(t, "GET", idA, port, "/", nil)
			req = req.WithContext(httptrace.WithClientTrace(req.Context(), &httptrace.ClientTrace{
				Got1xxResponse: func(code int, h textproto.MIMEHeader) error {
					hints = append(hints, fmt.Sprint(code, h.Get("Link")))
					return nil
				},
			}))
			res, _ := do(t, client, req)
			if res.StatusCode != 200 || len(hints) != 1 || hints[0] != "103</style.css>; rel=preload" {
				t.Errorf("answer = %s after %q", res.Status, hints)
			}
		})
	}
}

func TestExpectedBodyIsSentOnlyWhenTheGuestWantsIt(t *testing.T) {
	w := newWorld(t)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/refuse" {
			rw.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		io.Copy(rw, r.Body)
	})
	head := "POST %s HTTP/1.1\r\nHost: %d-%s.wrenn.test\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n"
	for i := range 200 {
		target, want := "/take", "HTTP/1.1 100"
		if i == 0 {
			target, want = "/refuse", "HTTP/1.1 413"
		}
		conn, err := net.Dial("tcp", w.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		fmt.Fprintf(conn, head, target, port, idA)
		answer := bufio.NewReader(conn)
		if line, err := answer.ReadString('\n'); !strings.HasPrefix(line, want) {
			t.Errorf("%s: first line = %q, %v; want %s", target, line, err, want)
		}
		if target == "/take" {
			answer.ReadString('\n')
			io.WriteString(conn, "body")
			res, err := http.ReadResponse(answer, nil)
			if err != nil {
				t.Fatal(err)
			}
			if b, _ := io.ReadAll(res.Body); string(b) != "body" {
				t.Fatalf("%s, echo = %q", res.Status, b)
			}
		}
	}
}

// websocketEcho sends every message back.
func websocketEcho(rw http.ResponseWriter, r *http.Request) {
	conn, err := websocket.Accept(rw, r, &websocket.AcceptOptions{Subprotocols: []string{"chat"}, InsecureSkipVerify: true})
	if err != nil {
		return
	}
	defer conn.CloseNow()
	for {
		kind, msg, err := conn.Read(r.Context())
		if err != nil {
			return
		}
		if err := conn.Write(r.Context(), kind, msg); err != nil {
			return
		}
	}
}

func (w *world) websocket(t testing.TB, port uint16) *websocket.Conn {
	t.Helper()
	req := w.request(t, "GET", idA, port, "/ws?x=1", nil)
	conn, _, err := websocket.Dial(req.Context(), req.URL.String(), &websocket.DialOptions{
		HTTPClient: w.http1, Host: req.Host, Subprotocols: []string{"chat"},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.CloseNow() })
	return conn
}

func TestWebSocketPasses(t *testing.T) {
	w := newWorld(t)
	port := guest(t, websocketEcho)
	conn := w.websocket(t, port)
	if conn.Subprotocol() != "chat" {
		t.Errorf("subprotocol = %q", conn.Subprotocol())
	}
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for _, msg := range []string{"a", strings.Repeat("b", 30000), ""} {
		if err := conn.Write(ctx, websocket.MessageText, []byte(msg)); err != nil {
			t.Fatal(err)
		}
		if _, got, err := conn.Read(ctx); err != nil || string(got) != msg {
			t.Fatalf("%d bytes came back as %d bytes, %v", len(msg), len(got), err)
		}
	}
	if err := conn.Close(websocket.StatusNormalClosure, "bye"); err != nil {
		t.Errorf("close: %v", err)
	}
	w.waitIdle(t)
}

func TestLargeBodiesTakeNoMemory(t *testing.T) {
	if testing.Short() {
		t.Skip("moves 4 GiB")
	}
	w := newWorld(t)
	size := int64(1 << 30)
	if raceDetector {
		size /= 16 // copying is that much slower
	}
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		if r.Method == "POST" {
			n, err := io.Copy(io.Discard, r.Body)
			fmt.Fprint(rw, n, err)
			return
		}
		rw.Header().Set("Content-Length", fmt.Sprint(size))
		io.CopyN(rw, zeros{}, size)
	})
	for name, client := range w.clients() {
		t.Run("download over "+name, func(t *testing.T) {
			res, err := client.Do(w.request(t, "GET", idA, port, "/", nil))
			if err != nil {
				t.Fatal(err)
			}
			defer res.Body.Close()
			heap := &heapWatch{}
			n, err := io.Copy(heap, res.Body)
			if err != nil || n != size {
				t.Fatalf("got %d bytes, %v", n, err)
			}
			heap.check(t)
		})
		t.Run("upload over "+name, func(t *testing.T) {
			heap := &heapWatch{}
			body := io.TeeReader(io.LimitReader(zeros{}, size), heap)
			_, answer := do(t, client, w.request(t, "POST", idA, port, "/", body))
			if answer != fmt.Sprint(size, nil) {
				t.Fatalf("guest got %s", answer)
			}
			heap.check(t)
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// heapWatch is a writer that looks at the heap every 8 MiB.
type heapWatch struct{ written, next, least, most uint64 }

func (h *heapWatch) Write(p []byte) (int, error) {
	h.written += uint64(len(p))
	if h.written >= h.next {
		h.next += 8 << 20
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		if h.least == 0 || m.HeapAlloc < h.least {
			h.least = m.HeapAlloc
		}
		h.most = max(h.most, m.HeapAlloc)
	}
	return len(p), nil
}

func (h *heapWatch) check(t *testing.T) {
	t.Helper()
	if grown := h.most - h.least; grown > 16<<20 {
		t.Errorf("heap varied by %d MiB while %d MiB passed", grown>>20, h.written>>20)
	}
}
