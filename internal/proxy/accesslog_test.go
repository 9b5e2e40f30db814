package proxy_test

import (
	"bufio"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/accesslog"
	"github.com/wrenn/wrenn/internal/proxy"
)

// logLines reads an access log that is closed.
func logLines(t testing.TB, path string) (lines []map[string]any) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var l map[string]any
		if err := json.Unmarshal(s.Bytes(), &l); err != nil {
			t.Fatalf("%s: %v", s.Bytes(), err)
		}
		if at, err := time.Parse("2006-01-02T15:04:05.000Z", l["time"].(string)); err != nil || time.Since(at) > time.Minute {
			t.Errorf("time is %v, %v", l["time"], err)
		}
		for _, key := range []string{"duration_ms", "answer_ms"} {
			if ms, ok := l[key].(float64); ok && (ms < 0 || ms > 20000) {
				t.Errorf("%s is %v", key, ms)
			}
			delete(l, key)
		}
		delete(l, "time")
		lines = append(lines, l)
	}
	return lines
}

func TestAccessLogHasALineForEachRequest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	log, err := accesslog.Open(path, nil)
	if err != nil {
		t.Fatal(err)
	}
	w := newWorldWith(t, proxy.Config{AccessLog: log})
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != "" {
			websocketEcho(rw, r)
			return
		}
		io.Copy(io.Discard, r.Body)
		io.WriteString(rw, "answer")
		if r.URL.Path == "/half" {
			rw.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}
	})
	do(t, w.http1, w.request(t, "POST", idA, port, "/a%2Fb//?token=secret", strings.NewReader("body")))
	do(t, w.http2, w.request(t, "GET", idA, port, "/%22", nil))
	w.waitIdle(t)
	res, err := w.http1.Do(w.request(t, "GET", idA, port, "/half", nil))
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(io.Discard, res.Body)
	res.Body.Close()
	w.waitIdle(t)
	conn := w.websocket(t, port)
	conn.Close(websocket.StatusNormalClosure, "")
	w.waitIdle(t)
	do(t, w.http1, w.request(t, "GET", idA, proxy.AgentPort, "/init", nil))
	_, body := do(t, w.http1, w.request(t, "GET", strings.Repeat("c", 20), 80, "/gone", nil))
	w.waitIdle(t)
	if err := log.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	line := func(method, path, protocol string, status int, sent, received int) map[string]any {
		return map[string]any{
			"sandbox": idA, "port": float64(port), "method": method, "path": path, "protocol": protocol, "status": float64(status),
			"sent": float64(sent), "received": float64(received), "client": "127.0.0.1",
		}
	}
	want := []map[string]any{
		line("POST", "/a%2Fb//", "HTTP/1.1", 200, 6, 4),
		line("GET", "/%22", "HTTP/2.0", 200, 6, 0),
		line("GET", "/half", "HTTP/1.1", 200, 6, 0),
		line("GET", "/ws", "HTTP/1.1", 101, 4, 8),
		line("GET", "/init", "HTTP/1.1", 404, 0, 0),
		line("GET", "/gone", "HTTP/1.1", 502, len(body), 0),
	}
	want[2]["broken"] = true
	want[4]["port"] = float64(proxy.AgentPort)
	want[5]["sandbox"], want[5]["port"] = strings.Repeat("c", 20), float64(80)
	if diff := cmp.Diff(want, logLines(t, path)); diff != "" {
		t.Errorf("access log: (-want +got)\n%s", diff)
	}
}
