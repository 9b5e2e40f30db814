// Package mmds asks a virtual machine's monitor who the machine is. The monitor
// serves a document on a link-local address (version 2 of its protocol: with a
// session token), set by the host before the machine runs and after each resume.
package mmds

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/sha512"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"
)

// Address is where monitors serve the document.
const Address = "http://169.254.169.254"

// Bounds of one attempt.
const (
	maxDocument = 64 << 10 // bytes
	maxToken    = 4 << 10  // bytes
	attempt     = 2 * time.Second
	tokenTTL    = time.Minute
)

// Document is what the host has said. Ids are empty where it has not.
type Document struct {
	SandboxID  string `json:"instanceID"`
	TemplateID string `json:"envID"`
	// AccessTokenHash is the SHA-256 or SHA-512, in hex, of the access token that
	// /init may bring: of the empty one where it may clear it.
	AccessTokenHash string `json:"accessTokenHash"`
}

// Authorizes reports whether token is the one whose hash the host has left.
func (d Document) Authorizes(token string) bool {
	want, err := hex.DecodeString(d.AccessTokenHash)
	if err != nil {
		return false
	}
	short, long := sha256.Sum256([]byte(token)), sha512.Sum512([]byte(token))
	return subtle.ConstantTimeCompare(want, short[:])|subtle.ConstantTimeCompare(want, long[:]) == 1
}

// parse reads a document. Fields that are not ours are of no interest.
func parse(data []byte) (Document, error) {
	var d Document
	if err := json.Unmarshal(data, &d); err != nil {
		return Document{}, fmt.Errorf("decode document: %w", err)
	}
	for _, s := range []string{d.SandboxID, d.TemplateID, d.AccessTokenHash} {
		if len(s) > 256 || strings.ContainsFunc(s, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
			return Document{}, errors.New("decode document: an id that is not one word")
		}
	}
	return d, nil
}

// Client asks one monitor. Make one with New.
type Client struct {
	base string
	http *http.Client

	mu    sync.Mutex
	token string
}

// New returns a client of the service at base.
func New(base string) *Client {
	return &Client{
		base: base,
		http: &http.Client{
			// No proxy, whatever the environment says, and no redirects: the
			// document comes from next door or not at all.
			Transport: &http.Transport{
				DialContext:            (&net.Dialer{Timeout: attempt}).DialContext,
				DisableKeepAlives:      true, // a connection does not outlive a snapshot
				DisableCompression:     true,
				MaxResponseHeaderBytes: maxDocument,
			},
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
	}
}

// Wait asks until the document names the sandbox or ctx is over.
func (c *Client) Wait(ctx context.Context) (Document, error) {
	const first, longest = 20 * time.Millisecond, 5 * time.Second
	timer := time.NewTimer(0)
	defer timer.Stop()
	var err error
	for pause := first; ; pause = min(2*pause, longest) {
		select {
		case <-ctx.Done():
			return Document{}, fmt.Errorf("wait for metadata: %w", errors.Join(context.Cause(ctx), err))
		case <-timer.C:
		}
		var d Document
		if d, err = c.Get(ctx); err == nil && d.SandboxID != "" {
			return d, nil
		}
		// Machines that start together do not ask together.
		timer.Reset(pause/2 + rand.N(pause))
	}
}

// Get asks once. A session token that is not valid any more is replaced.
func (c *Client) Get(ctx context.Context) (Document, error) {
	ctx, cancel := context.WithTimeout(ctx, attempt)
	defer cancel()
	token := c.swap("")
	fresh := token == ""
	for {
		if token == "" {
			var err error
			if token, err = c.newToken(ctx); err != nil {
				return Document{}, fmt.Errorf("get session token: %w", err)
			}
		}
		status, body, err := c.do(ctx, http.MethodGet, "/", maxDocument, http.Header{
			"X-Metadata-Token": {token}, "Accept": {"application/json"},
		})
		switch {
		case err != nil:
			return Document{}, fmt.Errorf("get metadata: %w", err)
		case status == http.StatusUnauthorized && !fresh:
			token, fresh = "", true
			continue
		case status != http.StatusOK:
			return Document{}, fmt.Errorf("get metadata: status %d", status)
		}
		c.swap(token) // good for the next time
		return parse(body)
	}
}

// swap keeps a session token and returns the one kept before.
func (c *Client) swap(token string) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	old := c.token
	c.token = token
	return old
}

func (c *Client) newToken(ctx context.Context) (string, error) {
	status, body, err := c.do(ctx, http.MethodPut, "/latest/api/token", maxToken, http.Header{
		"X-Metadata-Token-Ttl-Seconds": {fmt.Sprint(int(tokenTTL.Seconds()))},
	})
	if err != nil {
		return "", err
	}
	if status != http.StatusOK {
		return "", fmt.Errorf("status %d", status)
	}
	token := string(bytes.TrimSpace(body))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r >= 0x7f }) {
		return "", errors.New("not a token")
	}
	return token, nil
}

// do makes a request and reads the answer, which must not be longer than limit.
func (c *Client) do(ctx context.Context, method, path string, limit int64, header http.Header) (int, []byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, nil)
	if err != nil {
		return 0, nil, err
	}
	req.Header = header
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, limit+1))
	if err != nil {
		return 0, nil, err
	}
	if int64(len(body)) > limit {
		return 0, nil, fmt.Errorf("an answer of more than %d bytes", limit)
	}
	return resp.StatusCode, body, nil
}
