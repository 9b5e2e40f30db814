// Package guest is the host agent's client of envd, the guest agent in every
// sandbox: the routes that only the host calls. What users call (processes,
// files) goes through the data plane and never through here.
package guest

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"regexp"
	"strconv"
	"sync/atomic"
	"time"
)

// Port is where envd listens inside every sandbox.
const Port = 49983

// Bounds of what the host reads from a guest, which is not trusted. They are
// above what the guest agent keeps: 1 MiB of entries, each of 80 bytes or more.
const (
	maxAnswer  = 2 << 20  // bytes
	maxHeader  = 64 << 10 // bytes
	maxEntries = 1 << 14
)

// Client talks to the envd of one sandbox, over connections of its own: nothing
// of one sandbox is left when its client is closed.
type Client struct {
	http  *http.Client
	base  string
	token atomic.Pointer[string]
}

// NewClient returns a client for the guest at addr; token is its access token,
// empty where it has none. Close must be called.
func NewClient(addr netip.Addr, token string) *Client {
	c := &Client{
		http: &http.Client{
			Transport: &http.Transport{
				DialContext:            Dial,
				DisableCompression:     true,
				MaxIdleConnsPerHost:    1,
				IdleConnTimeout:        30 * time.Second,
				MaxResponseHeaderBytes: maxHeader,
			},
			// A guest that redirects would send the host, and the token with it,
			// to places that only the host can reach.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		base: "http://" + netip.AddrPortFrom(addr, Port).String(),
	}
	c.SetToken(token)
	return c
}

// Close drops the connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// SetToken changes the access token of further calls.
func (c *Client) SetToken(token string) { c.token.Store(&token) }

// InitRequest is what envd is told after every boot and resume.
type InitRequest struct {
	AccessToken    string            `json:"accessToken,omitempty"`
	EnvVars        map[string]string `json:"envVars,omitempty"`
	Timestamp      time.Time         `json:"timestamp"`
	DefaultUser    string            `json:"defaultUser,omitempty"`
	DefaultWorkdir string            `json:"defaultWorkdir,omitempty"`
	SandboxID      string            `json:"sandboxID,omitempty"`
	TemplateID     string            `json:"templateID,omitempty"`
	CABundle       string            `json:"caBundle,omitempty"` // certificate authorities to trust, in PEM
	// LifecycleID tells one boot or resume from the others; Init makes one up
	// where it is empty.
	LifecycleID string `json:"lifecycleID"`
	// Entropy is what the guest's random numbers are drawn from besides its own:
	// copies of one memory image would draw the same. Init makes it.
	Entropy []byte `json:"entropy"`
}

// entropySize is how much randomness a guest gets, in bytes.
const entropySize = 64

// Init tells a guest agent that is just starting who it is, and returns its
// version. It calls until the agent listens or ctx is over: that first answer
// is how the host learns that a sandbox is up.
func (c *Client) Init(ctx context.Context, req InitRequest) (version string, err error) {
	req.Entropy = make([]byte, entropySize)
	rand.Read(req.Entropy) // never fails
	if req.LifecycleID == "" {
		req.LifecycleID = rand.Text()
	}
	body, err := json.Marshal(req)
	if err != nil {
		return "", fmt.Errorf("encode init request: %w", err)
	}
	err = c.retry(ctx, func() error {
		version, err = c.init(ctx, body)
		return err
	})
	return version, err
}

// retry calls until the guest agent listens or ctx is over.
func (c *Client) retry(ctx context.Context, call func() error) (err error) {
	// A dial is refused at once while nothing listens, so a short pause is all
	// that separates the agent's readiness from our noticing it.
	const pause = 2 * time.Millisecond
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for guest agent: %w", errors.Join(context.Cause(ctx), err))
		case <-timer.C:
		}
		var dial *net.OpError
		if err = call(); err == nil || !errors.As(err, &dial) {
			return err
		}
		timer.Reset(pause)
	}
}

func (c *Client) init(ctx context.Context, body []byte) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	resp, err := c.do(ctx, http.MethodPost, "/init", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return "", statusError("initialise guest agent", resp)
	}
	version := resp.Header.Get("X-Envd-Version")
	if !versionPattern.MatchString(version) {
		return "", fmt.Errorf("initialise guest agent: malformed version %.40q", version)
	}
	return version, nil
}

// AwaitHealth returns once the guest agent answers.
func (c *Client) AwaitHealth(ctx context.Context) error {
	return c.retry(ctx, func() error {
		resp, err := c.do(ctx, http.MethodGet, "/health", nil)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if resp.StatusCode != http.StatusNoContent {
			return statusError("wait for guest agent", resp)
		}
		return nil
	})
}

// EnvVars returns the environment that every process of the sandbox gets.
func (c *Client) EnvVars(ctx context.Context) (map[string]string, error) {
	var env map[string]string
	err := c.get(ctx, "/envs", func(body *json.Decoder) error { return body.Decode(&env) })
	return env, err
}

// PowerOff asks the guest agent of a virtual machine to end it cleanly. It
// returns when the agent has taken the request.
func (c *Client) PowerOff(ctx context.Context) error {
	return c.order(ctx, "/poweroff", "power guest off")
}

// Sync has the guest write to its disk what it still holds in memory of its files.
func (c *Client) Sync(ctx context.Context) error {
	return c.order(ctx, "/sync", "sync guest's disk")
}

// order asks for what takes no words and gives none.
func (c *Client) order(ctx context.Context, path, what string) error {
	resp, err := c.do(ctx, http.MethodPost, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusNoContent {
		return statusError(what, resp)
	}
	return nil
}

var versionPattern = regexp.MustCompile(`^[0-9A-Za-z.+-]{0,40}$`)

// Metrics is envd's view of the sandbox. Sizes are bytes; CPUUsedPct counts
// 100 for each CPU that is fully used.
type Metrics struct {
	Timestamp  int64   `json:"ts"`
	CPUCount   int     `json:"cpu_count"`
	CPUUsedPct float64 `json:"cpu_used_pct"`
	MemTotal   int64   `json:"mem_total"`
	MemUsed    int64   `json:"mem_used"`
	MemCache   int64   `json:"mem_cache"`
	DiskUsed   int64   `json:"disk_used"`
	DiskTotal  int64   `json:"disk_total"`
}

// Metrics measures the sandbox from inside.
func (c *Client) Metrics(ctx context.Context) (Metrics, error) {
	var m Metrics
	err := c.get(ctx, "/metrics", func(body *json.Decoder) error { return body.Decode(&m) })
	return m, err
}

// LogEntry is one line of the guest agent's log.
type LogEntry struct {
	Time    time.Time
	Level   string
	Message string
	Fields  map[string]string
}

// Logs returns the entries later than after, oldest first. The agent keeps a
// bounded number of them.
func (c *Client) Logs(ctx context.Context, after time.Time) ([]LogEntry, error) {
	var ns int64
	if !after.IsZero() {
		ns = after.UnixNano()
	}
	var entries []LogEntry
	err := c.get(ctx, "/logs?after="+strconv.FormatInt(ns, 10), func(body *json.Decoder) (err error) {
		entries, err = decodeEntries(body)
		return err
	})
	return entries, err
}

// decodeEntries reads a list of entries one by one: a list as a whole could take
// many times its length in memory.
func decodeEntries(body *json.Decoder) ([]LogEntry, error) {
	if start, err := body.Token(); err != nil {
		return nil, err
	} else if start != json.Delim('[') {
		return nil, errors.New("not a list")
	}
	var entries []LogEntry
	for body.More() {
		if len(entries) == maxEntries {
			return nil, fmt.Errorf("more than %d entries", maxEntries)
		}
		var line struct {
			Time    time.Time                  `json:"time"`
			Level   string                     `json:"level"`
			Message string                     `json:"message"`
			Fields  map[string]json.RawMessage `json:"fields"`
		}
		if err := body.Decode(&line); err != nil {
			return nil, err
		}
		// JSON cannot carry every time that it can name: in UTC some are beyond 9999.
		if year := line.Time.UTC().Year(); year < 1970 || year > 9999 {
			return nil, fmt.Errorf("an entry of the year %d", year)
		}
		e := LogEntry{Time: line.Time, Level: line.Level, Message: line.Message, Fields: make(map[string]string, len(line.Fields))}
		for name, value := range line.Fields {
			e.Fields[name] = text(value)
		}
		entries = append(entries, e)
	}
	_, err := body.Token()
	return entries, err
}

// text is what a string says, and of any other value the JSON.
func text(value json.RawMessage) string {
	var s string
	if json.Unmarshal(value, &s) == nil && !bytes.Equal(value, []byte("null")) {
		return s
	}
	return string(value)
}

func (c *Client) get(ctx context.Context, path string, decode func(*json.Decoder) error) error {
	resp, err := c.do(ctx, http.MethodGet, path, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return statusError("get "+path+" from guest agent", resp)
	}
	if err := decode(json.NewDecoder(io.LimitReader(resp.Body, maxAnswer))); err != nil {
		return fmt.Errorf("decode guest agent's answer to %s: %w", path, err)
	}
	return nil
}

func (c *Client) do(ctx context.Context, method, path string, body io.Reader) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, body)
	if err != nil {
		return nil, fmt.Errorf("make request to guest agent: %w", err)
	}
	if token := *c.token.Load(); token != "" {
		req.Header.Set("X-Access-Token", token)
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, fmt.Errorf("call guest agent: %w", err)
	}
	return resp, nil
}

func statusError(what string, resp *http.Response) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 512)) // best effort: it only explains the status
	return fmt.Errorf("%s: status %d: %s", what, resp.StatusCode, bytes.TrimSpace(text))
}
