package guest_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/guest"
)

// impostor serves h where the host expects a guest agent, and returns a client.
func impostor(t *testing.T, h http.HandlerFunc) *guest.Client {
	t.Helper()
	addr := netip.MustParseAddr("127.83.0.1")
	l, err := net.Listen("tcp", netip.AddrPortFrom(addr, guest.Port).String())
	if err != nil {
		t.Skip("the guest agent's port is taken on this host: ", err)
	}
	srv := &httptest.Server{Listener: l, Config: &http.Server{Handler: h}}
	srv.Start()
	c := guest.NewClient(addr, "token")
	t.Cleanup(func() { c.Close(); srv.Close() })
	return c
}

func TestAGuestCannotSendTheHostElsewhere(t *testing.T) {
	var visits atomic.Int32
	internal := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		visits.Add(1)
		io.WriteString(w, "{}")
	}))
	defer internal.Close()
	for _, status := range []int{http.StatusFound, http.StatusTemporaryRedirect} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			c := impostor(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, internal.URL, status) })
			if _, err := c.Metrics(t.Context()); err == nil {
				t.Error("metrics from elsewhere were taken")
			}
			if _, err := c.Init(t.Context(), guest.InitRequest{AccessToken: "token"}); err == nil {
				t.Error("init by somebody else was taken")
			}
			if n := visits.Load(); n > 0 {
				t.Errorf("the host went %d times where the guest sent it", n)
			}
		})
	}
}

func TestAHostileAnswerIsAnErrorAndCheap(t *testing.T) {
	endless := func(w io.Writer, piece string) {
		piece = strings.Repeat(piece, 1000)
		for {
			if _, err := io.WriteString(w, piece); err != nil {
				return
			}
		}
	}
	for name, answer := range map[string]http.HandlerFunc{
		"entries without end": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "["); endless(w, "{},") },
		"more entries than any agent keeps": func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, "["+strings.Repeat(`{"time":"2026-01-02T03:04:05Z"},`, 50_000)+"{}]")
		},
		"a string without end":    func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `["`); endless(w, "x") },
		"nesting without end":     func(w http.ResponseWriter, _ *http.Request) { endless(w, "[") },
		"spaces without end":      func(w http.ResponseWriter, _ *http.Request) { endless(w, " ") },
		"a header beyond measure": func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("X", strings.Repeat("x", 1<<20)) },
		"an object":               func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `{"time":"x"}`) },
		"numbers":                 func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `[1,2]`) },
		"half a list":             func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, `[{}`) },
		"a time beyond JSON's": func(w http.ResponseWriter, _ *http.Request) {
			io.WriteString(w, `[{"time":"9999-12-31T23:59:59-23:00"}]`)
		},
		"nothing":                   func(http.ResponseWriter, *http.Request) {},
		"an answer that never ends": func(w http.ResponseWriter, r *http.Request) { w.(http.Flusher).Flush(); <-r.Context().Done() },
	} {
		t.Run(name, func(t *testing.T) {
			c := impostor(t, answer)
			ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
			defer cancel()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			entries, err := c.Logs(ctx, time.Time{})
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Errorf("taken for %d entries", len(entries))
			}
			if took := (after.TotalAlloc - before.TotalAlloc) >> 20; took > 24 {
				t.Errorf("it took %d MiB to refuse it", took)
			}
		})
	}
}

func TestAVersionIsOneShortWord(t *testing.T) {
	for version, good := range map[string]bool{"0.6.13": true, "1.0.0-rc.1+x": true, "": true, "1 <script>": false, strings.Repeat("1", 1000): false} {
		t.Run(fmt.Sprintf("%.20q", version), func(t *testing.T) {
			c := impostor(t, func(w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("X-Envd-Version", version)
				w.WriteHeader(http.StatusNoContent)
			})
			got, err := c.Init(t.Context(), guest.InitRequest{})
			if good != (err == nil) || (good && got != version) {
				t.Errorf("got %q, %v", got, err)
			}
		})
	}
}

func TestEntriesComeAsTheAgentWroteThem(t *testing.T) {
	c := impostor(t, func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `[{"time":"2026-01-02T03:04:05.6Z","level":"warn","message":"m\n","fields":{"s":"a b","n":12345678901234567890,"t":true,"o":{"k":[1]},"z":null}}]`)
	})
	got, err := c.Logs(t.Context(), time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	want := []guest.LogEntry{{
		Time: time.Date(2026, 1, 2, 3, 4, 5, 6e8, time.UTC), Level: "warn", Message: "m\n",
		Fields: map[string]string{"s": "a b", "n": "12345678901234567890", "t": "true", "o": `{"k":[1]}`, "z": "null"},
	}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestEveryInitBringsRandomnessAndALifeOfItsOwn(t *testing.T) {
	var bodies []map[string]any
	c := impostor(t, func(w http.ResponseWriter, r *http.Request) {
		var body map[string]any
		if err := json.NewDecoder(r.Body).Decode(&body); err != nil {
			t.Error(err)
		}
		bodies = append(bodies, body)
		w.WriteHeader(http.StatusNoContent)
	})
	for _, life := range []string{"", "", "given"} {
		if _, err := c.Init(t.Context(), guest.InitRequest{LifecycleID: life}); err != nil {
			t.Fatal(err)
		}
	}
	seen := map[any]bool{}
	for _, body := range bodies {
		entropy, err := base64.StdEncoding.DecodeString(fmt.Sprint(body["entropy"]))
		if err != nil || len(entropy) != 64 || bytes.Equal(entropy, make([]byte, 64)) {
			t.Errorf("entropy %v, %v", body["entropy"], err)
		}
		if seen[body["entropy"]] || seen[body["lifecycleID"]] || body["lifecycleID"] == "" {
			t.Errorf("the same again: %v", body)
		}
		seen[body["entropy"]], seen[body["lifecycleID"]] = true, true
	}
	if len(bodies) != 3 || bodies[2]["lifecycleID"] != "given" {
		t.Errorf("got %v", bodies)
	}
}

func TestOnlyAnAgentThatAgreesIsPoweringOff(t *testing.T) {
	for status, good := range map[int]bool{204: true, 200: false, 403: false, 404: false} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			c := impostor(t, func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodPost || r.URL.Path != "/poweroff" || r.Header.Get("X-Access-Token") != "token" {
					t.Errorf("asked for %s %s", r.Method, r.URL)
				}
				w.WriteHeader(status)
			})
			if err := c.PowerOff(t.Context()); good != (err == nil) {
				t.Errorf("got error %v", err)
			}
		})
	}
}
