// Package access decides who may talk to the guest agent: by the sandbox's
// access token, or by a signature made with it for one path and operation.
package access

import (
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"
)

// TokenHeader carries the access token.
const TokenHeader = "X-Access-Token"

// Operation is what a signature allows.
type Operation string

// The operations of the /files route.
const (
	Read  Operation = "read"
	Write Operation = "write"
)

// Errors of the checks. Clients compare their texts.
var (
	ErrToken     = errors.New("unauthorized access, please provide a valid access token or method signing if supported")
	ErrHeader    = errors.New("access token present in header but does not match")
	ErrUnsigned  = errors.New("missing signature query parameter")
	ErrSignature = errors.New("invalid signature")
	ErrExpired   = errors.New("signature is already expired")
)

// Guard holds the access token. While none is set everybody is let in: the
// sandbox is not a secured one. The zero value is ready.
type Guard struct {
	mu    sync.RWMutex
	token string
}

// Set changes the token; "" opens the agent to everybody.
func (g *Guard) Set(token string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.token = token
}

// Secured reports whether a token is set.
func (g *Guard) Secured() bool { return g.current() != "" }

// Allows reports whether token opens the agent.
func (g *Guard) Allows(token string) bool {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.token == "" || subtle.ConstantTimeCompare([]byte(g.token), []byte(token)) == 1
}

func (g *Guard) current() string {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return g.token
}

// CheckHeader returns ErrToken unless the request carries the token.
func (g *Guard) CheckHeader(r *http.Request) error {
	if !g.Allows(r.Header.Get(TokenHeader)) {
		return ErrToken
	}
	return nil
}

// CheckFile decides on a file transfer: by the token header when there is one,
// else by the signature in the query.
func (g *Guard) CheckFile(header http.Header, query url.Values, op Operation, now time.Time) error {
	token := g.current()
	if token == "" {
		return nil
	}
	if sent := header.Get(TokenHeader); sent != "" {
		if subtle.ConstantTimeCompare([]byte(token), []byte(sent)) != 1 {
			return ErrHeader
		}
		return nil
	}
	if !query.Has("signature") {
		return ErrUnsigned
	}
	expiry, expires := query.Get("signature_expiration"), query.Has("signature_expiration")
	want := Sign(query.Get("path"), op, query.Get("username"), token, expiry)
	if subtle.ConstantTimeCompare([]byte(want), []byte(query.Get("signature"))) != 1 {
		return ErrSignature
	}
	if expires {
		at, err := strconv.ParseInt(expiry, 10, 64)
		if err != nil {
			return ErrSignature
		}
		if at < now.Unix() {
			return ErrExpired
		}
	}
	return nil
}

// Sign returns the signature that allows op on path. Expiry is in unix seconds,
// "" for a signature that does not expire.
func Sign(path string, op Operation, username, token, expiry string) string {
	parts := []string{path, string(op), username, token}
	if expiry != "" {
		parts = append(parts, expiry)
	}
	sum := sha256.Sum256([]byte(strings.Join(parts, ":")))
	return "v1_" + base64.RawStdEncoding.EncodeToString(sum[:])
}
