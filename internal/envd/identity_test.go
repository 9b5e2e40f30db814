package envd_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/wrenn/wrenn/internal/envd"
	"github.com/wrenn/wrenn/internal/envd/mmds"
)

// startWithMetadata starts an agent whose machine's monitor serves the document.
func startWithMetadata(t *testing.T, document *atomic.Pointer[string]) *agent {
	t.Helper()
	return startAsking(t, true, func(w http.ResponseWriter) { io.WriteString(w, *document.Load()) })
}

// startAsking starts an agent whose monitor gives the answers of answer.
func startAsking(t *testing.T, hashedToken bool, answer func(http.ResponseWriter)) *agent {
	t.Helper()
	monitor := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPut:
			io.WriteString(w, "session")
		case r.Header.Get("X-metadata-token") != "session":
			w.WriteHeader(http.StatusUnauthorized)
		default:
			answer(w)
		}
	}))
	t.Cleanup(monitor.Close)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() {
		ended <- envd.New(envd.Config{Metadata: mmds.New(monitor.URL), HashedToken: hashedToken}).Serve(ctx, l)
	}()
	a := &agent{url: "http://" + l.Addr().String(), http: &http.Client{Transport: &http.Transport{}}}
	t.Cleanup(func() {
		a.http.CloseIdleConnections()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return a
}

// env returns the environment that processes get.
func (a *agent) env(t *testing.T) map[string]string {
	t.Helper()
	_, _, body := a.call(t, "GET", "/envs", nil)
	var env map[string]string
	if err := json.Unmarshal(body, &env); err != nil {
		t.Fatalf("%v: %s", err, body)
	}
	return env
}

func TestTheMonitorSaysWhoTheSandboxIsAtBootAndAfterEachResume(t *testing.T) {
	var document atomic.Pointer[string]
	set := func(s string) { document.Store(&s) }
	set(`{"instanceID":"i1","envID":"t1"}`)
	a := startWithMetadata(t, &document)
	is := func(sandbox, template string) {
		t.Helper()
		eventually(t, "it is "+sandbox, func() bool {
			env := a.env(t)
			return env["WRENN_SANDBOX_ID"] == sandbox && env["E2B_SANDBOX_ID"] == sandbox && env["WRENN_TEMPLATE_ID"] == template
		})
	}
	is("i1", "t1") // without any init
	set(`{"instanceID":"i2","envID":"t2"}`)
	if got := a.init(t, map[string]any{"lifecycleID": "second"}); got != 204 {
		t.Fatal(got)
	}
	is("i2", "t2")
	if got := a.init(t, map[string]any{"sandboxID": "i3", "lifecycleID": "second"}); got != 204 {
		t.Fatal(got)
	}
	is("i3", "t2") // the same life: nobody is asked again
	set(`{}`)      // after a resume, until the host has set it
	a.init(t, map[string]any{"sandboxID": "i4", "lifecycleID": "third"})
	set(`{"instanceID":"i4","envID":"t4"}`)
	is("i4", "t4")
}

// The monitor is asked for want of anybody else: not once the host has said it, nor for
// the host's request to be let in, which waits for it.
func TestAMonitorIsNotAskedForWhatTheHostHasSaid(t *testing.T) {
	var asked atomic.Int32
	first, answer := make(chan struct{}), make(chan struct{})
	a := startAsking(t, false, func(w http.ResponseWriter) {
		if asked.Add(1) == 1 {
			close(first)
		}
		<-answer
		io.WriteString(w, `{"instanceID":"old","envID":"old"}`)
	})
	<-first
	for _, life := range []string{"first", "second"} {
		if got := a.init(t, map[string]any{"sandboxID": "i1", "templateID": "t1", "lifecycleID": life}); got != 204 {
			t.Fatal(got)
		}
	}
	close(answer)
	if got := a.init(t, map[string]any{"lifecycleID": "third"}); got != 204 { // asks, and by that shows that the others have not
		t.Fatal(got)
	}
	eventually(t, "the monitor's word is taken", func() bool { return a.env(t)["WRENN_SANDBOX_ID"] == "old" })
	if n := asked.Load(); n != 2 {
		t.Errorf("the monitor was asked %d times, want once at the start and once after the third", n)
	}
}

func TestTheTokenWhoseHashTheMonitorHasIsTaken(t *testing.T) {
	var document atomic.Pointer[string]
	hash := func(token string) {
		sum := sha256.Sum256([]byte(token))
		s := `{"instanceID":"i","accessTokenHash":"` + hex.EncodeToString(sum[:]) + `"}`
		document.Store(&s)
	}
	hash("one")
	a := startWithMetadata(t, &document)
	for _, step := range []struct {
		what, monitor, token string
		want                 int
	}{
		{"a stranger comes first", "one", "stolen", 401},
		{"and without a token", "one", "", 401},
		{"the host", "one", "one", 204},
		{"the host after a resume, with a new token", "two", "two", 204},
		{"who knew the old one", "two", "one", 401},
		{"who knows the present one needs no hash", "three", "two", 204},
		{"the token may be cleared only when the monitor says so", "three", "", 401},
		{"and then is", "", "", 204},
	} {
		hash(step.monitor)
		if got := a.init(t, map[string]any{"accessToken": step.token}); got != step.want {
			t.Errorf("%s: got %d, want %d", step.what, got, step.want)
		}
	}
	if got, _, _ := a.call(t, "GET", "/envs", nil); got != 200 {
		t.Errorf("after the token was cleared: %d", got)
	}
}

func TestABadInitRequestChangesNothing(t *testing.T) {
	a := startAgent(t)
	a.init(t, map[string]any{"accessToken": "secret", "envVars": map[string]string{"A": "1"}, "sandboxID": "i1"})
	a.token = "secret"
	big := make([]byte, 20<<20)
	for i := range big {
		big[i] = ' '
	}
	for name, body := range map[string]any{
		"one bad variable among good ones": `{"accessToken":"secret","sandboxID":"i2","envVars":{"B":"2","C=":"3"}}`,
		"a bad timestamp":                  `{"accessToken":"secret","sandboxID":"i2","timestamp":"yesterday"}`,
		"a bad authority":                  `{"accessToken":"other","sandboxID":"i2","caBundle":"none"}`,
		"20 MiB":                           big,
	} {
		if status, _, text := a.call(t, "POST", "/init", body); status != 400 {
			t.Errorf("%s: got %d %s", name, status, text)
		}
		if env := a.env(t); env["A"] != "1" || env["B"] != "" || env["E2B_SANDBOX_ID"] != "i1" {
			t.Errorf("%s: now %v", name, env)
		}
	}
	if status, _, _ := a.call(t, "POST", "/poweroff", nil); status != 404 {
		t.Errorf("power-off where there is no machine: %d", status)
	}
}
