package proxy

import (
	"crypto/subtle"
	"net/http"
	"strings"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// headerAccessToken carries the token that the guest agent of a secured sandbox
// wants.
const headerAccessToken = "X-Access-Token"

// wake has a paused sandbox resumed for a request that may reach it, and aims the
// request at it; else it answers as for a sandbox that does not run.
func (s *stream) wake(r *http.Request, where Target) bool {
	if !wakes(r, s.dest.Port, where.Access) {
		s.proxy.failResolve(s, r, sandbox.ErrNotFound)
		return false
	}
	awake, err := where.Wake(s.ctx)
	if err != nil {
		s.proxy.failResolve(s, r, err)
		return false
	}
	s.aim(awake)
	return true
}

// wakes reports whether a request resumes a paused sandbox. To the guest agent it
// must be one that the agent would not refuse at once, and the question whether it
// is alive is answered by saying no: asking must not change the answer.
func wakes(r *http.Request, port uint16, a Access) bool {
	if port != AgentPort {
		return true
	}
	path := r.URL.Path
	switch {
	case path == "/health":
		return false
	case a.AgentToken == "":
		return true
	case strings.HasPrefix(path, "/files") && r.URL.Query().Get("signature") != "":
		return true // the guest agent checks it
	case r.Method == http.MethodOptions:
		// A browser asks if it may send the token, which it does without.
		return strings.Contains(strings.ToLower(r.Header.Get("Access-Control-Request-Headers")), strings.ToLower(headerAccessToken))
	}
	token := r.Header[headerAccessToken]
	return len(token) == 1 && subtle.ConstantTimeCompare([]byte(token[0]), []byte(a.AgentToken)) == 1
}
