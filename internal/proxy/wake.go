package proxy

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// headerAccessToken carries the token that the guest agent of a secured sandbox
// wants.
const headerAccessToken = "X-Access-Token"

// wake has a paused sandbox resumed for a request that may reach it, and aims the
// request at it; else it answers as for a sandbox that does not run.
func (s *stream) wake(r *http.Request, where Target) bool {
	if s.dest.Port == AgentPort && where.Access.AgentToken != "" && announces(r, headerAccessToken) {
		// A browser asks if it may send the token, which it does without.
		s.allowPreflight(r.Header)
		return false
	}
	if !wakes(r, s.dest.Port, s.target.path, where.Access, time.Now()) {
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
func wakes(r *http.Request, port uint16, path string, a Access, now time.Time) bool {
	if port != AgentPort {
		return true
	}
	switch {
	case path == "/health":
		return false
	case a.AgentToken == "":
		return true
	}
	if token := r.Header[headerAccessToken]; len(token) > 0 {
		return len(token) == 1 && subtle.ConstantTimeCompare([]byte(token[0]), []byte(a.AgentToken)) == 1
	}
	return path == "/files" && signed(r, a.AgentToken, now)
}

// signed reports whether a transfer of a file has the signature that the guest agent
// wants in place of the token.
func signed(r *http.Request, token string, now time.Time) bool {
	operation := "write"
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		operation = "read"
	}
	query := r.URL.Query()
	parts := []string{query.Get("path"), operation, query.Get("username"), token}
	if query.Has("signature_expiration") {
		expiry := query.Get("signature_expiration")
		if at, err := strconv.ParseInt(expiry, 10, 64); err != nil || at < now.Unix() {
			return false
		}
		parts = append(parts, expiry)
	}
	sum := sha256.Sum256([]byte(strings.Join(parts, ":")))
	want := "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
	return subtle.ConstantTimeCompare([]byte(want), []byte(query.Get("signature"))) == 1
}
