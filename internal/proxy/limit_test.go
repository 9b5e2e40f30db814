package proxy_test

import (
	"io"
	"net/http"
	"strings"
	"testing"

	"github.com/wrenn/wrenn/internal/proxy"
)

func TestOneSandboxCannotTakeEverything(t *testing.T) {
	w := newWorldWith(t, proxy.Config{Limit: 3})
	release := make(chan struct{})
	hold := func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/hold" {
			rw.(http.Flusher).Flush()
			<-release
		}
	}
	port := guest(t, hold)
	var held []*http.Response
	for range 3 {
		res, err := w.http1.Do(w.request(t, "GET", idA, port, "/hold", nil))
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, res)
	}
	res, body := do(t, w.http1, w.request(t, "GET", idA, port, "/", nil))
	if res.StatusCode != 503 || res.Header.Get("Retry-After") != "1" || !strings.Contains(body, "close some") {
		t.Errorf("the fourth: %s %q", res.Status, body)
	}
	// Others are not touched, and nor is the guest agent, even of the same sandbox.
	guestAt(t, "127.0.0.2:49983", hold)
	for id, port := range map[string]uint16{idA: 49983, idB: 49983} {
		if res, body := do(t, w.http1, w.request(t, "GET", id, port, "/", nil)); res.StatusCode == 503 {
			t.Errorf("port %d of %s: %s %q", port, id, res.Status, body)
		}
	}
	close(release)
	for _, res := range held {
		io.Copy(io.Discard, res.Body)
		res.Body.Close()
	}
	w.waitIdle(t)
	if res, body := do(t, w.http1, w.request(t, "GET", idA, port, "/", nil)); res.StatusCode != 200 {
		t.Errorf("after they have ended: %s %q", res.Status, body)
	}
}
