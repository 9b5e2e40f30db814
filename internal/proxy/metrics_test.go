package proxy_test

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/wrenn/wrenn/internal/proxy"
)

// scrape returns the counts of a sandbox's port, or with neither those of all: by
// name without what is common, and by class for requests. Zeros are left out.
func (w *world) scrape(t testing.TB, id, port string) map[string]float64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(w.proxy)
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := make(map[string]float64)
	for _, f := range families {
		name := strings.TrimPrefix(f.GetName(), "wrenn_proxy_")
		if rest, all := strings.CutPrefix(name, "all_"); all != (id == "") {
			continue
		} else if all {
			name = rest
		}
		for _, m := range f.GetMetric() {
			labels := make(map[string]string)
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			if labels["sandbox"] != id || labels["port"] != port {
				continue
			}
			key := name
			if labels["code"] != "" {
				key = labels["code"]
			}
			if h := m.GetHistogram(); h != nil {
				found[key] = float64(h.GetSampleCount())
			} else {
				found[key] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	maps.DeleteFunc(found, func(_ string, v float64) bool { return v == 0 })
	return found
}

func (w *world) expect(t testing.TB, id string, port uint16, want map[string]float64) {
	t.Helper()
	label := ""
	if id != "" {
		label = strconv.Itoa(int(port))
	}
	if diff := cmp.Diff(want, w.scrape(t, id, label)); diff != "" {
		t.Errorf("counted for sandbox %q port %s: (-want +got)\n%s", id, label, diff)
	}
}

func TestRequestsAreCountedBySandboxAndPort(t *testing.T) {
	for _, version := range []string{"HTTP/1.1", "HTTP/2"} {
		t.Run(version, func(t *testing.T) {
			w := newWorld(t)
			client := w.clients()[version]
			client.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
			port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
				io.Copy(io.Discard, r.Body)
				status, _ := strconv.Atoi(r.URL.Path[1:])
				rw.WriteHeader(status)
				if status != 304 {
					io.WriteString(rw, "12345")
				}
			})
			other := guestAt(t, "127.0.0.2:0", func(rw http.ResponseWriter, r *http.Request) {})
			for _, status := range []int{200, 206, 304, 404, 500} {
				do(t, client, w.request(t, "POST", idA, port, fmt.Sprint("/", status), strings.NewReader("1234567")))
			}
			do(t, client, w.request(t, "GET", idB, other, "/", nil))
			do(t, client, w.request(t, "GET", idB, closedPort(t), "/", nil))
			w.waitIdle(t)
			w.expect(t, idA, port, map[string]float64{
				"2xx": 2, "3xx": 1, "4xx": 1, "5xx": 1, "sent_bytes_total": 20, "received_bytes_total": 35, "answer_seconds": 5,
			})
			w.expect(t, idB, other, map[string]float64{"2xx": 1, "answer_seconds": 1})
			all := w.scrape(t, "", "")
			if all["2xx"] != 3 || all["5xx"] != 2 || all["answer_seconds"] != 6 || all["dial_failures_total"] != 1 || all["received_bytes_total"] != 35 {
				t.Errorf("counted for all: %v", all)
			}
		})
	}
}

func TestSandboxesThatThereAreNotLeaveNoTrace(t *testing.T) {
	w := newWorld(t)
	for i := range 20 {
		do(t, w.http1, w.request(t, "GET", fmt.Sprintf("%020d", i), 80, "/", nil))
	}
	do(t, w.http1, w.request(t, "GET", idA, proxy.AgentPort, "/init", nil))
	w.waitIdle(t)
	all := w.scrape(t, "", "")
	if all["5xx"] != 20 || all["4xx"] != 1 || all["sent_bytes_total"] == 0 {
		t.Errorf("counted for all: %v", all)
	}
	if n := w.series(t); n != 0 {
		t.Errorf("%d time series by sandbox", n)
	}
}

// series is how many time series there are by sandbox, histograms counted as one.
func (w *world) series(t testing.TB) (n int) {
	t.Helper()
	metrics := make(chan prometheus.Metric)
	go func() { defer close(metrics); w.proxy.Collect(metrics) }()
	for m := range metrics {
		if strings.Contains(m.Desc().String(), "sandbox,port") {
			n++
		}
	}
	return n
}

func TestWebSocketsAreCountedWhileTheyLast(t *testing.T) {
	w := newWorld(t)
	port := guest(t, websocketEcho)
	conn := w.websocket(t, port)
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := conn.Write(ctx, websocket.MessageText, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := conn.Read(ctx); err != nil {
		t.Fatal(err)
	}
	// A message has a header of a few bytes, and a mask from the client.
	want := map[string]float64{"open_streams": 1, "sent_bytes_total": 1004, "received_bytes_total": 1008}
	w.waitFor(t, func() bool { return cmp.Equal(want, w.scrape(t, idA, strconv.Itoa(int(port)))) })
	conn.Close(websocket.StatusNormalClosure, "")
	w.waitIdle(t)
	w.expect(t, idA, port, map[string]float64{"1xx": 1, "answer_seconds": 1, "sent_bytes_total": 1008, "received_bytes_total": 1016})
}

func TestWebSocketOverHTTP2IsCountedAsOne(t *testing.T) {
	w := newWorld(t)
	port := guest(t, websocketEcho)
	res, upload := w.connect(t, port, http.Header{})
	upload.Write(frame("hello"))
	if _, err := io.ReadFull(res.Body, make([]byte, 7)); err != nil {
		t.Fatal(err)
	}
	w.waitFor(t, func() bool {
		return cmp.Equal(w.scrape(t, idA, strconv.Itoa(int(port))),
			map[string]float64{"open_streams": 1, "sent_bytes_total": 7, "received_bytes_total": 11})
	})
	upload.Write([]byte{0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8}) // close, 1000
	io.Copy(io.Discard, res.Body)
	upload.Close()
	w.waitIdle(t)
	w.expect(t, idA, port, map[string]float64{"1xx": 1, "answer_seconds": 1, "sent_bytes_total": 11, "received_bytes_total": 19})
}

func TestDownloadThatTheClientBreaksOffIsCountedAsBroken(t *testing.T) {
	for _, version := range []string{"HTTP/1.1", "HTTP/2"} {
		t.Run(version, func(t *testing.T) {
			w := newWorld(t)
			port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
				for r.Context().Err() == nil {
					if _, err := rw.Write(make([]byte, 64<<10)); err != nil {
						return
					}
				}
			})
			ctx, cancel := context.WithCancel(t.Context())
			res, err := w.clients()[version].Do(w.request(t, "GET", idA, port, "/", nil).WithContext(ctx))
			if err != nil {
				t.Fatal(err)
			}
			io.ReadFull(res.Body, make([]byte, 100<<10))
			w.waitFor(t, func() bool { // a piece is counted once it has been written, and may be here before
				live := w.scrape(t, idA, strconv.Itoa(int(port)))
				return live["sent_bytes_total"] >= 100<<10 && live["open_streams"] == 1
			})
			cancel()
			res.Body.Close()
			w.waitIdle(t)
			got := w.scrape(t, idA, strconv.Itoa(int(port)))
			if got["broken"] != 1 || got["2xx"] != 0 || got["open_streams"] != 0 {
				t.Errorf("counted: %v", got)
			}
		})
	}
}

func TestRequestsOverTheLimitAreCountedAsRefused(t *testing.T) {
	w := newWorldWith(t, proxy.Config{Limit: 1})
	hold, arrived := make(chan struct{}), make(chan struct{})
	port := guest(t, func(http.ResponseWriter, *http.Request) { close(arrived); <-hold })
	first := make(chan int, 1)
	req := w.request(t, "GET", idA, port, "/", nil)
	go func() {
		res, err := w.http1.Do(req)
		if err != nil {
			first <- 0
			return
		}
		res.Body.Close()
		first <- res.StatusCode
	}()
	receive(t, arrived)
	for range 3 {
		if res, _ := do(t, w.http2, w.request(t, "GET", idA, port, "/", nil)); res.StatusCode != 503 {
			t.Errorf("answer = %s", res.Status)
		}
	}
	close(hold)
	if status := receive(t, first); status != 200 {
		t.Errorf("first request: %d", status)
	}
	w.waitIdle(t)
	w.expect(t, idA, port, map[string]float64{"refused": 3, "2xx": 1, "answer_seconds": 1})
}

func TestEvictedSandboxIsCountedForTheWholeOnly(t *testing.T) {
	w := newWorld(t)
	started := make(chan struct{}, 1)
	port := guest(t, func(rw http.ResponseWriter, r *http.Request) {
		io.WriteString(rw, "x")
		rw.(http.Flusher).Flush()
		if r.URL.Path == "/stay" {
			started <- struct{}{}
			<-r.Context().Done()
		}
	})
	do(t, w.http1, w.request(t, "GET", idA, port, "/", nil))
	res, err := w.http1.Do(w.request(t, "GET", idA, port, "/stay", nil))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	receive(t, started)
	w.waitFor(t, func() bool { return w.scrape(t, idA, strconv.Itoa(int(port)))["sent_bytes_total"] == 2 })
	w.kill(idA)
	if n := w.series(t); n != 0 {
		t.Errorf("%d time series are left", n)
	}
	w.waitIdle(t)
	want := map[string]float64{"2xx": 1, "broken": 1, "sent_bytes_total": 2, "answer_seconds": 2}
	w.expect(t, "", 0, want)

	// It comes back: its own counters begin anew.
	w.sandboxes.add(idA, "127.0.0.1")
	do(t, w.http1, w.request(t, "GET", idA, port, "/", nil))
	w.waitIdle(t)
	w.expect(t, idA, port, map[string]float64{"2xx": 1, "sent_bytes_total": 1, "answer_seconds": 1})
	w.expect(t, "", 0, map[string]float64{"2xx": 2, "broken": 1, "sent_bytes_total": 3, "answer_seconds": 3})
}

func (w *world) waitFor(t testing.TB, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); {
		if time.Now().After(deadline) {
			t.Fatal("not within 10 s")
		}
		time.Sleep(time.Millisecond) // between two looks
	}
}

func TestPortsThatAreCountedApartAreFew(t *testing.T) {
	// Every port of the sandbox leads to one server, but those above 1000.
	port := guest(t, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "x") })
	w := newWorldWith(t, proxy.Config{Dial: func(ctx context.Context, network, addr string) (net.Conn, error) {
		if _, asked, _ := net.SplitHostPort(addr); len(asked) > 3 && asked != strconv.Itoa(proxy.AgentPort) {
			return nil, io.ErrUnexpectedEOF
		}
		return new(net.Dialer).DialContext(ctx, network, fmt.Sprint("127.0.0.1:", port))
	}})
	ask := func(port int) { do(t, w.http1, w.request(t, "GET", idA, uint16(port), "/", nil)) }
	for i := range 100 {
		ask(2000 + i) // somebody tries ports
	}
	for i := range 100 {
		ask(1 + i) // counted with the others until there has been an answer
		w.waitIdle(t)
		ask(1 + i)
	}
	ask(proxy.AgentPort)
	ask(1)
	w.waitIdle(t)
	if n := w.series(t); n > 66*7 {
		t.Errorf("%d time series", n)
	}
	w.expect(t, idA, 1, map[string]float64{"2xx": 2, "sent_bytes_total": 2, "answer_seconds": 2})
	w.expect(t, idA, 50, map[string]float64{"2xx": 1, "sent_bytes_total": 1, "answer_seconds": 1})
	w.expect(t, idA, 64, map[string]float64{})
	w.expect(t, idA, 2050, map[string]float64{})
	w.expect(t, idA, proxy.AgentPort, map[string]float64{"2xx": 1, "sent_bytes_total": 1, "answer_seconds": 1})
	other := w.scrape(t, idA, "other")
	const silent = 8 // of those that were tried are counted apart
	if other["2xx"] < 100 || other["5xx"] != 100-silent || other["dial_failures_total"] != 100-silent {
		t.Errorf("counted for the other ports: %v", other)
	}
}

// everywhere resolves every sandbox to this machine.
type everywhere struct{}

func (everywhere) Resolve(_ context.Context, id string) (proxy.Target, error) {
	return proxy.Target{SandboxID: id, Addr: netip.MustParseAddr("127.0.0.1")}, nil
}

// BenchmarkScrape is what 1,000 sandboxes with three ports each come to.
func BenchmarkScrape(b *testing.B) {
	port := guest(b, func(rw http.ResponseWriter, _ *http.Request) { io.WriteString(rw, "x") })
	w := newWorldWith(b, proxy.Config{Resolver: everywhere{}, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, fmt.Sprint("127.0.0.1:", port))
	}})
	for i := range 1000 {
		for port := range 3 {
			do(b, w.http1, w.request(b, "GET", fmt.Sprintf("%020d", i), uint16(1+port), "/", nil))
		}
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(w.proxy)
	for _, encoding := range []string{"identity", "gzip"} {
		b.Run(encoding, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				rec := httptest.NewRecorder()
				req := httptest.NewRequest("GET", "/metrics", nil)
				req.Header.Set("Accept-Encoding", encoding)
				promhttp.HandlerFor(registry, promhttp.HandlerOpts{}).ServeHTTP(rec, req)
				if rec.Code != 200 || rec.Body.Len() < 10<<10 {
					b.Fatal(rec.Code, rec.Body.Len())
				}
				b.ReportMetric(float64(rec.Body.Len()), "bytes/scrape")
			}
		})
	}
}
