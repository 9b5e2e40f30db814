package proxy_test

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/wrenn/wrenn/internal/proxy"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// sleeper resolves sandbox A, which is paused until it is woken.
type sleeper struct {
	access proxy.Access
	err    error // of waking it
	woken  atomic.Int32
}

func (s *sleeper) Resolve(_ context.Context, id string) (proxy.Target, error) {
	if id != idA {
		return proxy.Target{}, sandbox.ErrNotFound
	}
	return proxy.Target{SandboxID: id, Access: s.access, Wake: func(context.Context) (proxy.Target, error) {
		s.woken.Add(1)
		return proxy.Target{SandboxID: id, Addr: netip.MustParseAddr("127.0.0.1"), Access: s.access}, s.err
	}}, nil
}

func TestARequestThatWakesASandboxIsAnsweredByIt(t *testing.T) {
	s := &sleeper{access: public}
	w := newWorldWith(t, proxy.Config{Resolver: s})
	port := guest(t, tell)
	for version, client := range w.clients() {
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() {
				if res, body := do(t, client, w.request(t, "GET", idA, port, "/a?b", nil)); res.StatusCode != 200 || body != `/a?b token=[] cookie=[]` {
					t.Errorf("%s: %s %s", version, res.Status, body)
				}
			})
		}
		wg.Wait()
	}
}

func TestWhatMayNotReachASandboxDoesNotWakeIt(t *testing.T) {
	secured := protected
	secured.AgentToken = "secret"
	for name, tc := range map[string]struct {
		access proxy.Access
		port   uint16
		method string
		path   string
		header http.Header
		wakes  bool
		status int // of one that does not
	}{
		"a protected port without token":   {access: protected, port: 8000, path: "/", status: 403},
		"a protected port with its token":  {access: protected, port: 8000, path: "/", header: http.Header{proxy.HeaderTrafficToken: {token}}, wakes: true},
		"a public port":                    {access: public, port: 8000, path: "/health", wakes: true},
		"the guest agent's health":         {access: public, port: proxy.AgentPort, path: "/health", status: 502},
		"the guest agent unsecured":        {access: public, port: proxy.AgentPort, path: "/files", wakes: true},
		"the guest agent without token":    {access: secured, port: proxy.AgentPort, path: "/files", status: 502},
		"the guest agent, a wrong token":   {access: secured, port: proxy.AgentPort, path: "/files", header: http.Header{"X-Access-Token": {"secre"}}, status: 502},
		"the guest agent, its token":       {access: secured, port: proxy.AgentPort, path: "/files", header: http.Header{"X-Access-Token": {"secret"}}, wakes: true},
		"the guest agent, a signed URL":    {access: secured, port: proxy.AgentPort, path: "/files?path=a&username=u&signature=" + signature("a:read:u:secret"), wakes: true},
		"the guest agent, for a while":     {access: secured, port: proxy.AgentPort, path: "/files?path=a&signature_expiration=9999999999&signature=" + signature("a:read::secret:9999999999"), wakes: true},
		"the guest agent, too late":        {access: secured, port: proxy.AgentPort, path: "/files?path=a&signature_expiration=1&signature=" + signature("a:read::secret:1"), status: 502},
		"the guest agent, signed to read":  {access: secured, port: proxy.AgentPort, method: "POST", path: "/files?path=a&signature=" + signature("a:read::secret"), status: 502},
		"the guest agent, a wrong sign":    {access: secured, port: proxy.AgentPort, path: "/files?path=a&signature=v1_x", status: 502},
		"the guest agent, a browser asks":  {access: secured, port: proxy.AgentPort, method: "OPTIONS", path: "/files", header: http.Header{"Origin": {"http://a"}, "Access-Control-Request-Method": {"POST"}, "Access-Control-Request-Headers": {"content-type, x-access-token"}}, status: 204},
		"the guest agent, asked otherwise": {access: secured, port: proxy.AgentPort, method: "OPTIONS", path: "/files", status: 502},
	} {
		t.Run(name, func(t *testing.T) {
			s := &sleeper{access: tc.access}
			w := newWorldWith(t, proxy.Config{Resolver: s})
			method := tc.method
			if method == "" {
				method = "GET"
			}
			req := w.request(t, method, idA, tc.port, tc.path, nil)
			for name, values := range tc.header {
				req.Header[name] = values
			}
			res, body := do(t, w.http1, req)
			if woken := s.woken.Load() > 0; woken != tc.wakes || !tc.wakes && res.StatusCode != tc.status {
				t.Errorf("woken: %v, %s %s", woken, res.Status, body)
			}
		})
	}
}

// signature is what stands for the token in the URL of a file.
func signature(of string) string {
	sum := sha256.Sum256([]byte(of))
	return url.QueryEscape("v1_" + base64.RawStdEncoding.EncodeToString(sum[:]))
}

func TestTheQuestionForHealthWakesNothingUnderAPathEither(t *testing.T) {
	s := &sleeper{access: public}
	w := newWorldWith(t, proxy.Config{Resolver: s})
	req := w.request(t, "GET", idA, 1, fmt.Sprintf("/proxy/%s/%d/health", idA, proxy.AgentPort), nil)
	req.Host = ""
	if res, body := do(t, w.http1, req); res.StatusCode != 502 || s.woken.Load() > 0 {
		t.Errorf("woken: %d times, %s %s", s.woken.Load(), res.Status, body)
	}
}

func TestASandboxThatCannotBeWokenIsSaidToBeThatWay(t *testing.T) {
	port := guest(t, tell)
	for status, err := range map[int]error{
		502: sandbox.Errorf(sandbox.ErrNotFound, "gone meanwhile"),
		503: sandbox.Errorf(sandbox.ErrUnavailable, "the host does not answer"),
		500: errors.New("something else"),
	} {
		s := &sleeper{access: public, err: err}
		w := newWorldWith(t, proxy.Config{Resolver: s})
		if res, body := do(t, w.http1, w.request(t, "GET", idA, port, "/", nil)); res.StatusCode != status {
			t.Errorf("%v: %s %s, want %d", err, res.Status, body, status)
		}
	}
}
