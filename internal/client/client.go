// Package client talks to a platform from outside, as its users do: E2B's control
// API for sandboxes, and in each sandbox envd's RPCs and file routes through the
// data plane. The command line and the benchmarks are built on it.
package client

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// Config says which platform to talk to. APIURL or Domain is needed.
type Config struct {
	APIURL     string // base URL of the control API; empty: https://api.{Domain}
	SandboxURL string // base URL of the data plane; empty: https://49983-{id}.{Domain}, or APIURL when there is no Domain
	Domain     string // host[:port] under which sandboxes have host names; may be empty
	APIKey     string

	// HTTPClient, when set, carries everything instead of the client's own
	// transports. It must not have an overall timeout.
	HTTPClient *http.Client
}

// Client is safe for concurrent use.
type Client struct {
	config  Config
	control *http.Client // control API: short calls
	data    *http.Client // sandboxes: streams that may last for days
}

// controlTimeout ends a call of the control API that is not answered. Creating a
// sandbox can take a while on a host that is busy.
const controlTimeout = 2 * time.Minute

// New returns a client of the given platform. It does not connect.
func New(config Config) (*Client, error) {
	if config.APIURL == "" && config.Domain != "" {
		config.APIURL = "https://api." + config.Domain
	}
	if config.SandboxURL == "" && config.Domain == "" {
		config.SandboxURL = config.APIURL
	}
	config.APIURL = strings.TrimRight(config.APIURL, "/")
	config.SandboxURL = strings.TrimRight(config.SandboxURL, "/")
	for _, raw := range []string{config.APIURL, config.SandboxURL} {
		if raw == "" && config.Domain != "" {
			continue
		}
		u, err := url.Parse(raw)
		if err != nil || (u.Scheme != "http" && u.Scheme != "https") || u.Host == "" {
			return nil, fmt.Errorf("platform address %q is not an http or https URL", raw)
		}
	}
	c := &Client{config: config}
	if config.HTTPClient != nil {
		c.control, c.data = config.HTTPClient, config.HTTPClient
	} else {
		c.control = &http.Client{Transport: newTransport(), Timeout: controlTimeout}
		c.data = &http.Client{Transport: newTransport()}
	}
	data := *c.data
	data.Transport = goneTransport{data.Transport}
	c.data = &data
	return c, nil
}

// FromEnvironment returns a client of the platform that the environment or the
// data directory names. See Environment.
func FromEnvironment(dataDir string) (*Client, error) {
	c, err := Environment(dataDir)
	if err != nil {
		return nil, err
	}
	return New(Config{APIURL: c.APIURL, SandboxURL: c.SandboxURL, Domain: c.Domain, APIKey: c.APIKey})
}

// Close drops idle connections.
func (c *Client) Close() {
	c.control.CloseIdleConnections()
	c.data.CloseIdleConnections()
}

// newTransport returns a transport with a pool of its own. It speaks HTTP/1.1
// only: over HTTP/2 a bulk transfer and a terminal would share one connection's
// flow control.
func newTransport() *http.Transport {
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout: 10 * time.Second,
		Protocols:           protocols,
		MaxIdleConnsPerHost: 64,
		IdleConnTimeout:     90 * time.Second,
		DisableCompression:  true, // loopback or near: compressing costs more than it saves
		WriteBufferSize:     64 << 10,
		ReadBufferSize:      64 << 10,
	}
}

// answer is what there is to an answer of the control API beside its body.
type answer struct {
	status int
	header http.Header
}

// call does one exchange with the control API: in, when not nil, is sent as JSON,
// and the answer's body is decoded into out, when not nil.
func (c *Client) call(ctx context.Context, op, method, path string, in, out any) (answer, error) {
	var body io.Reader
	if in != nil {
		encoded, err := json.Marshal(in)
		if err != nil {
			return answer{}, fmt.Errorf("%s: encode request: %w", op, err)
		}
		body = bytes.NewReader(encoded)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.config.APIURL+path, body)
	if err != nil {
		return answer{}, fmt.Errorf("%s: %w", op, err)
	}
	req.Header.Set("X-API-Key", c.config.APIKey)
	req.Header.Set("User-Agent", "wrenn-cli")
	if in != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.control.Do(req)
	if err != nil {
		return answer{}, fmt.Errorf("%s: %w", op, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode/100 != 2 {
		return answer{}, readError(op, resp)
	}
	if out == nil {
		_, _ = io.Copy(io.Discard, io.LimitReader(resp.Body, maxErrorBody)) // so that the connection can be used again
		return answer{resp.StatusCode, resp.Header}, nil
	}
	if err := json.NewDecoder(resp.Body).Decode(out); err != nil {
		return answer{}, fmt.Errorf("%s: decode answer: %w", op, err)
	}
	return answer{resp.StatusCode, resp.Header}, nil
}

// goneTransport turns the proxy's 502 answers into GoneErrors. Left to the RPC
// client they would become "502 Bad Gateway" without the reason.
type goneTransport struct{ next http.RoundTripper }

func (t goneTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	next := t.next
	if next == nil {
		next = http.DefaultTransport //nolint:forbidigo // only where the caller's own client asks for it
	}
	resp, err := next.RoundTrip(req)
	if err != nil || resp.StatusCode != http.StatusBadGateway {
		return resp, err
	}
	defer resp.Body.Close()
	var shape struct {
		SandboxID string `json:"sandboxId"`
		Message   string `json:"message"`
	}
	if json.NewDecoder(io.LimitReader(resp.Body, maxErrorBody)).Decode(&shape) != nil || shape.Message == "" {
		shape.Message = "the platform cannot reach the sandbox"
	}
	if shape.SandboxID == "" {
		shape.SandboxID = req.Header.Get(headerSandboxID)
	}
	return nil, &GoneError{SandboxID: shape.SandboxID, Message: shape.Message}
}

// CloseIdleConnections lets http.Client reach the pool below.
func (t goneTransport) CloseIdleConnections() {
	if c, ok := t.next.(interface{ CloseIdleConnections() }); ok {
		c.CloseIdleConnections()
	}
}
