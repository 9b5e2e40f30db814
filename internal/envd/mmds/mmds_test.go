package mmds

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// monitor serves metadata as a virtual machine's monitor does: version 2 of the
// protocol, and strict about it.
type monitor struct {
	t *testing.T

	mu       sync.Mutex
	document string // "" until the host has set it
	tokens   map[string]time.Time
	now      time.Time
	issued   int
	asked    chan struct{} // gets one for each GET
}

func newMonitor(t *testing.T, document string) (*monitor, *Client) {
	m := &monitor{t: t, document: document, tokens: map[string]time.Time{}, now: time.Unix(1000, 0), asked: make(chan struct{}, 1000)}
	s := httptest.NewServer(m)
	t.Cleanup(s.Close)
	return m, New(s.URL)
}

func (m *monitor) set(document string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.document = document
}

func (m *monitor) pass(d time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.now = m.now.Add(d)
}

func (m *monitor) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.Header.Get("X-Forwarded-For") != "" {
		m.t.Error("a forwarded request: monitors refuse those")
	}
	switch {
	case r.Method == http.MethodPut && r.URL.Path == "/latest/api/token":
		ttl, err := strconv.Atoi(r.Header.Get("X-metadata-token-ttl-seconds"))
		if err != nil || ttl < 1 || ttl > 21600 {
			http.Error(w, "Token time to live value not found", http.StatusBadRequest)
			return
		}
		token := rand.Text()
		m.tokens[token] = m.now.Add(time.Duration(ttl) * time.Second)
		m.issued++
		io.WriteString(w, token)
	case r.Method == http.MethodGet && r.URL.Path == "/":
		m.asked <- struct{}{}
		until, ok := m.tokens[r.Header.Get("X-metadata-token")]
		if !ok || m.now.After(until) {
			http.Error(w, "MMDS token not valid.", http.StatusUnauthorized)
			return
		}
		if m.document == "" {
			http.Error(w, "The MMDS data store is not initialized.", http.StatusBadRequest)
			return
		}
		if r.Header.Get("Accept") != "application/json" {
			io.WriteString(w, "instanceID\nenvID") // the list of keys, for people
			return
		}
		io.WriteString(w, m.document)
	default:
		http.Error(w, "Not allowed HTTP method.", http.StatusMethodNotAllowed)
	}
}

func TestTheDocumentSaysWhoTheMachineIs(t *testing.T) {
	_, c := newMonitor(t, `{"instanceID":"i1","envID":"t1","accessTokenHash":"00","address":"http://x","more":{"a":[1]}}`)
	got, err := c.Wait(t.Context())
	if want := (Document{SandboxID: "i1", TemplateID: "t1", AccessTokenHash: "00"}); err != nil || got != want {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestASessionTokenIsUsedUntilItExpiresAndThenReplaced(t *testing.T) {
	m, c := newMonitor(t, `{"instanceID":"i1"}`)
	for range 3 {
		if _, err := c.Get(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if m.issued != 1 {
		t.Errorf("%d tokens for three requests", m.issued)
	}
	m.pass(tokenTTL + time.Second)
	if d, err := c.Get(t.Context()); err != nil || d.SandboxID != "i1" {
		t.Errorf("after the token expired: %+v, %v", d, err)
	}
	if m.issued != 2 {
		t.Errorf("%d tokens, want a second one", m.issued)
	}
}

func TestItAsksUntilTheHostHasNamedTheSandbox(t *testing.T) {
	m, c := newMonitor(t, "")
	answer := make(chan Document)
	go func() {
		d, _ := c.Wait(t.Context())
		answer <- d
	}()
	for range 2 {
		<-m.asked
	}
	m.set(`{"envID":"only this"}`)
	<-m.asked
	m.set(`{"envID":"t"}`)
	<-m.asked
	m.set(`{"instanceID":"i2","envID":"t2"}`)
	if d := <-answer; d.SandboxID != "i2" || d.TemplateID != "t2" {
		t.Errorf("got %+v", d)
	}
}

func TestWaitingEndsWithItsContextAndSaysWhatWasWrong(t *testing.T) {
	m, c := newMonitor(t, "")
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		<-m.asked
		cancel()
	}()
	_, err := c.Wait(ctx)
	if err == nil || ctx.Err() == nil || !strings.Contains(err.Error(), "wait for metadata") {
		t.Errorf("got %v", err)
	}
}

func TestAHostileServiceIsAnErrorAndNoMore(t *testing.T) {
	elsewhere := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		t.Error("it went where it was sent")
		io.WriteString(w, `{"instanceID":"forged"}`)
	}))
	defer elsewhere.Close()
	t.Setenv("HTTP_PROXY", elsewhere.URL)
	endless := func(w http.ResponseWriter, r *http.Request, piece string) {
		for r.Context().Err() == nil {
			if _, err := io.WriteString(w, piece); err != nil {
				return
			}
		}
	}
	token := func(w http.ResponseWriter, r *http.Request) bool {
		if r.Method == http.MethodPut {
			io.WriteString(w, "token")
		}
		return r.Method == http.MethodPut
	}
	for name, h := range map[string]http.HandlerFunc{
		"no token":             func(http.ResponseWriter, *http.Request) {},
		"a token of two lines": func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "a\r\nHost: b") },
		"a token without end":  func(w http.ResponseWriter, r *http.Request) { endless(w, r, "tttt") },
		"a redirect": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL, http.StatusTemporaryRedirect)
		},
		"a redirect of the document": func(w http.ResponseWriter, r *http.Request) {
			if !token(w, r) {
				http.Redirect(w, r, elsewhere.URL, http.StatusFound)
			}
		},
		"a document without end": func(w http.ResponseWriter, r *http.Request) {
			if !token(w, r) {
				endless(w, r, strings.Repeat(" ", 4096))
			}
		},
		"never a valid token": func(w http.ResponseWriter, r *http.Request) {
			if !token(w, r) {
				w.WriteHeader(http.StatusUnauthorized)
			}
		},
		"an id with a line break": func(w http.ResponseWriter, r *http.Request) {
			if !token(w, r) {
				io.WriteString(w, `{"instanceID":"a\nb"}`)
			}
		},
		"an id of another type": func(w http.ResponseWriter, r *http.Request) {
			if !token(w, r) {
				io.WriteString(w, `{"instanceID":7}`)
			}
		},
		"no answer at all": func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := httptest.NewServer(h)
			defer s.Close()
			ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
			defer cancel()
			if d, err := New(s.URL).Get(ctx); err == nil {
				t.Errorf("taken: %+v", d)
			}
		})
	}
}

func TestOnlyTheTokenOfTheHashIsAuthorized(t *testing.T) {
	short, long := sha256.Sum256([]byte("token")), sha512.Sum512([]byte("token"))
	empty := sha256.Sum256(nil)
	for _, tc := range []struct {
		hash, token string
		want        bool
	}{
		{hex.EncodeToString(short[:]), "token", true},
		{hex.EncodeToString(long[:]), "token", true},
		{strings.ToUpper(hex.EncodeToString(short[:])), "token", true},
		{hex.EncodeToString(short[:]), "tokens", false},
		{hex.EncodeToString(short[:]), "", false},
		{hex.EncodeToString(empty[:]), "", true},
		{hex.EncodeToString(empty[:]), "token", false},
		{hex.EncodeToString(short[:16]), "token", false},
		{"", "", false},
		{"", "token", false},
		{"zz", "token", false},
	} {
		if got := (Document{AccessTokenHash: tc.hash}).Authorizes(tc.token); got != tc.want {
			t.Errorf("hash %.12q…, token %q: got %v", tc.hash, tc.token, got)
		}
	}
}

func FuzzParseTakesOnlyIdsThatAreWords(f *testing.F) {
	for _, s := range []string{`{}`, `null`, `[]`, `{"instanceID":"a","envID":"b","accessTokenHash":"c"}`, `{"INSTANCEID":"a b"}`, `{"instanceID":"\u0000"}`, `{"instanceID":null}`, `{"envID":"é"}`} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		d, err := parse(data)
		if err != nil {
			if d != (Document{}) {
				t.Errorf("an error, and still %+v", d)
			}
			return
		}
		for _, s := range []string{d.SandboxID, d.TemplateID, d.AccessTokenHash} {
			if len(s) > 256 || strings.TrimFunc(s, func(r rune) bool { return r > ' ' && r < 0x7f }) != "" {
				t.Errorf("taken: %q", s)
			}
		}
	})
}
