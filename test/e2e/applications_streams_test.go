package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// Events and WebSockets of one sandbox, as programs and browsers have them.
func TestEventsAndWebSockets(t *testing.T) {
	w := startWeb(t, suite.base.RootFS)
	b := w.create(nil)
	w.upload(t, b, "sse_clock.py")
	w.upload(t, b, "ws_echo.py")
	clock := w.serve(t, b, 9100, "", "exec python3 /home/user/sse_clock.py 9100")
	echo := w.serve(t, b, 9200, "", "exec python3 /home/user/ws_echo.py 9200 127.0.0.1")
	for _, f := range w.forms(b, 9100) {
		t.Run("clock in the form "+f.name, func(t *testing.T) { readClock(t, w.client(t, true), f.url+"clock", clock) })
	}
	for _, f := range w.forms(b, 9200) {
		t.Run("echo in the form "+f.name, func(t *testing.T) { useWebSocket(t, w.client(t, false), f.url, echo) })
	}
	t.Run("browser", func(t *testing.T) {
		w.browse(t, b, "streams.browser.mjs", map[string][]form{"clock": w.forms(b, 9100), "echo": w.forms(b, 9200)})
	})
}

// lateness is how long an event may be under way on a machine that is busy. What
// collects events until a buffer is full holds them up for far longer.
const lateness = time.Second

func readClock(t *testing.T, client *http.Client, url string, server *session) {
	gone := strings.Count(server.output(), "left")
	next := 1
	for _, count := range []int{20, 10} { // the second time as one who connects again
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		req, _ := http.NewRequestWithContext(ctx, "GET", url, nil)
		req.Header.Set("Accept", "text/event-stream")
		req.Header.Set("Last-Event-ID", fmt.Sprint(next-1))
		res, err := client.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		if kind := res.Header.Get("Content-Type"); res.StatusCode != 200 || kind != "text/event-stream" {
			t.Fatalf("%s, %s", res.Status, kind)
		}
		lines := bufio.NewScanner(res.Body)
		for until := next + count; next < until; {
			if !lines.Scan() {
				t.Fatalf("the stream ended before event %d: %v", next, lines.Err())
			}
			if id, ok := strings.CutPrefix(lines.Text(), "id: "); ok && id != fmt.Sprint(next) {
				t.Fatalf("event %s, want %d", id, next)
			}
			if sent, ok := strings.CutPrefix(lines.Text(), "data: "); ok {
				seconds, err := strconv.ParseFloat(sent, 64)
				late := time.Since(time.UnixMicro(int64(seconds * 1e6)))
				if err != nil || late > lateness {
					t.Errorf("event %d came %s after it was sent, %v", next, late, err)
				}
				next++
			}
		}
		cancel()
	}
	eventually(t, 10*time.Second, "the server notices that both clients have left", func() error {
		if n := strings.Count(server.output(), "left") - gone; n != 2 {
			return fmt.Errorf("it noticed %d", n)
		}
		return nil
	})
}

func useWebSocket(t *testing.T, client *http.Client, url string, server *session) {
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	dial := func() *websocket.Conn {
		t.Helper()
		c, res, err := websocket.Dial(ctx, url, &websocket.DialOptions{HTTPClient: client, Subprotocols: []string{"echo.v2", "echo.v1"}})
		if err != nil {
			t.Fatalf("%v, %v", err, res)
		}
		t.Cleanup(func() { c.CloseNow() })
		c.SetReadLimit(-1)
		if c.Subprotocol() != "echo.v2" {
			t.Errorf("subprotocol %q", c.Subprotocol())
		}
		return c
	}
	closed := strings.Count(server.output(), "closed")

	c := dial()
	big := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	for _, m := range []struct {
		kind websocket.MessageType
		data []byte
	}{{websocket.MessageText, []byte("grüße")}, {websocket.MessageBinary, []byte{0, 255, 10, 13}}, {websocket.MessageText, nil}, {websocket.MessageBinary, big}} {
		if err := c.Write(ctx, m.kind, m.data); err != nil {
			t.Fatal(err)
		}
		kind, data, err := c.Read(ctx)
		if err != nil || kind != m.kind || !bytes.Equal(data, m.data) {
			t.Fatalf("sent %d bytes of type %v, got %d of type %v, %v", len(m.data), m.kind, len(data), kind, err)
		}
	}

	// In fragments, which come back as such.
	out, err := c.Writer(ctx, websocket.MessageText)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		out.Write(big[:5000])
	}
	out.Close()
	if _, data, err := c.Read(ctx); err != nil || !bytes.Equal(data, bytes.Repeat(big[:5000], 3)) {
		t.Fatalf("%d bytes in three fragments came back as %d, %v", 15000, len(data), err)
	}

	// The pong is read by who reads messages; the server answers in order.
	reading := make(chan error, 1)
	go func() {
		_, data, err := c.Read(ctx)
		if string(data) != "after the ping" {
			err = errors.Join(err, fmt.Errorf("read %q", data))
		}
		reading <- err
	}()
	if err := c.Ping(ctx); err != nil {
		t.Fatalf("ping: %v", err)
	}
	c.Write(ctx, websocket.MessageText, []byte("after the ping"))
	if err := <-reading; err != nil {
		t.Fatal(err)
	}

	if err := c.Close(4001, "enough"); err != nil {
		t.Errorf("close with a code: %v", err)
	}
	c = dial()
	c.Write(ctx, websocket.MessageText, []byte("close 4002"))
	_, _, err = c.Read(ctx)
	var end websocket.CloseError
	if !errors.As(err, &end) || end.Code != 4002 || end.Reason != "as you say" {
		t.Errorf("the server closed with 4002, the client got %v", err)
	}
	eventually(t, 10*time.Second, "the server has seen two proper ends", func() error {
		if n := strings.Count(server.output(), "closed") - closed; n != 2 {
			return fmt.Errorf("it saw %d", n)
		}
		return nil
	})
	c = dial()
	dropped := strings.Count(server.output(), "dropped")
	c.CloseNow()
	eventually(t, 10*time.Second, "the server notices that the client has vanished", func() error {
		if strings.Count(server.output(), "dropped") == dropped {
			return errors.New("it did not")
		}
		return nil
	})
}
