package client

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// Info is what the control API tells about a sandbox. Create leaves out
// what only Get and List know (times, sizes, state, metadata).
type Info struct {
	SandboxID          string            `json:"sandboxID"`
	TemplateID         string            `json:"templateID"`
	Alias              string            `json:"alias,omitempty"`
	ClientID           string            `json:"clientID,omitempty"`
	State              string            `json:"state,omitempty"`
	StartedAt          time.Time         `json:"startedAt,omitzero"`
	EndAt              time.Time         `json:"endAt,omitzero"`
	CPUCount           int               `json:"cpuCount,omitempty"`
	MemoryMB           int64             `json:"memoryMB,omitempty"`
	DiskSizeMB         int64             `json:"diskSizeMB,omitempty"`
	Metadata           map[string]string `json:"metadata,omitempty"`
	EnvdVersion        string            `json:"envdVersion,omitempty"`
	EnvdAccessToken    string            `json:"envdAccessToken,omitempty"`    // a secret: for envd only
	TrafficAccessToken string            `json:"trafficAccessToken,omitempty"` // a secret: for the other ports, where they are protected
	Domain             string            `json:"domain,omitempty"`
	Lifecycle          *Lifecycle        `json:"lifecycle,omitempty"`
}

// Lifecycle is what happens to a sandbox by itself.
type Lifecycle struct {
	OnTimeout  string `json:"onTimeout"` // kill or pause
	AutoResume bool   `json:"autoResume"`
}

// CreateRequest describes a sandbox to create. Zero values leave the choice to
// the platform.
type CreateRequest struct {
	TemplateID          string
	Timeout             time.Duration // time to live; rounded up to seconds
	Metadata            map[string]string
	EnvVars             map[string]string
	AllowInternetAccess *bool
	Protected           bool   // ports want the traffic token or a preview link
	MaskRequestHost     string // Host that its applications see; empty: the client's
	AutoPause           bool   // at the end of its time it is paused, not killed
	FilesOnly           bool   // that pause keeps files only
	AutoResume          bool   // a request to one of its ports wakes it
	Start               string // how to start it from a template, for measurements: image (not from the pool) or boot; empty: the quickest way
}

type network struct {
	AllowPublicTraffic *bool  `json:"allowPublicTraffic,omitempty"`
	MaskRequestHost    string `json:"maskRequestHost,omitempty"`
}

type autoResume struct {
	Enabled bool `json:"enabled"`
}

// Create starts a sandbox and returns when it serves. Its processes and files are
// protected by the access token in the answer.
func (c *Client) Create(ctx context.Context, r CreateRequest) (Info, error) {
	body := struct {
		TemplateID          string            `json:"templateID"`
		Timeout             int64             `json:"timeout,omitempty"`
		Metadata            map[string]string `json:"metadata,omitempty"`
		EnvVars             map[string]string `json:"envVars,omitempty"`
		AllowInternetAccess *bool             `json:"allow_internet_access,omitempty"`
		Network             network           `json:"network,omitzero"`
		AutoPause           bool              `json:"autoPause,omitempty"`
		AutoPauseMemory     *bool             `json:"autoPauseMemory,omitempty"`
		AutoResume          autoResume        `json:"autoResume,omitzero"`
		Start               string            `json:"wrennStart,omitempty"`
	}{
		TemplateID: r.TemplateID, Timeout: seconds(r.Timeout), Metadata: r.Metadata, EnvVars: r.EnvVars,
		AllowInternetAccess: r.AllowInternetAccess, Network: network{MaskRequestHost: r.MaskRequestHost},
		AutoPause: r.AutoPause, AutoResume: autoResume{r.AutoResume}, Start: r.Start,
	}
	if r.Protected {
		body.Network.AllowPublicTraffic = new(bool)
	}
	if r.FilesOnly {
		body.AutoPauseMemory = new(bool)
	}
	var info Info
	_, err := c.call(ctx, "create sandbox", http.MethodPost, "/v2/sandboxes", body, &info)
	return info, err
}

// Get describes one sandbox.
func (c *Client) Get(ctx context.Context, id string) (Info, error) {
	var info Info
	_, err := c.call(ctx, "get sandbox", http.MethodGet, "/sandboxes/"+url.PathEscape(id), nil, &info)
	return info, err
}

// Kill ends a sandbox. When it returns, nothing of the sandbox runs any more.
func (c *Client) Kill(ctx context.Context, id string) error {
	_, err := c.call(ctx, "kill sandbox", http.MethodDelete, "/sandboxes/"+url.PathEscape(id), nil, nil)
	return err
}

// SetTimeout makes a sandbox end d from now, earlier or later than before.
func (c *Client) SetTimeout(ctx context.Context, id string, d time.Duration) error {
	body := struct {
		Timeout int64 `json:"timeout"`
	}{seconds(d)}
	_, err := c.call(ctx, "set timeout", http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/timeout", body, nil)
	return err
}

// Refresh makes a sandbox live for d from now at least; d is at most an hour.
func (c *Client) Refresh(ctx context.Context, id string, d time.Duration) error {
	body := struct {
		Duration int64 `json:"duration"`
	}{seconds(d)}
	_, err := c.call(ctx, "refresh sandbox", http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/refreshes", body, nil)
	return err
}

// PreviewLink is a URL whose bearer reaches a port for a while.
type PreviewLink struct {
	URL       string    `json:"url"` // a secret as long as it holds
	ExpiresAt time.Time `json:"expiresAt"`
}

// PreviewLink makes a preview link that holds for d, at most 7 days.
func (c *Client) PreviewLink(ctx context.Context, id string, port uint16, d time.Duration) (PreviewLink, error) {
	body := struct {
		Port      uint16 `json:"port"`
		ExpiresIn int64  `json:"expiresIn"`
	}{port, seconds(d)}
	var link PreviewLink
	_, err := c.call(ctx, "make preview link", http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/preview-links", body, &link)
	return link, err
}

// ListQuery says which sandboxes to list. The zero value lists all.
type ListQuery struct {
	Metadata map[string]string // all of these
	States   []string          // any of these: running, paused
	Limit    int               // page size, 1 to 100; zero: 100
	Page     string            // where to go on, from the call before
}

// List returns one page of the caller's sandboxes, newest first, and where the
// next page begins: empty after the last one.
func (c *Client) List(ctx context.Context, q ListQuery) (page []Info, next string, err error) {
	values := url.Values{}
	if len(q.Metadata) > 0 {
		// The value is a query string of its own, its parts escaped once more, as
		// E2B's clients send it.
		pairs := url.Values{}
		for k, v := range q.Metadata {
			pairs.Set(escape(k), escape(v))
		}
		values.Set("metadata", pairs.Encode())
	}
	if len(q.States) > 0 {
		values.Set("state", strings.Join(q.States, ","))
	}
	if q.Limit > 0 {
		values.Set("limit", strconv.Itoa(q.Limit))
	}
	if q.Page != "" {
		values.Set("nextToken", q.Page)
	}
	path := "/v2/sandboxes"
	if len(values) > 0 {
		path += "?" + values.Encode()
	}
	answer, err := c.call(ctx, "list sandboxes", http.MethodGet, path, nil, &page)
	if err != nil {
		return nil, "", err
	}
	return page, answer.header.Get("X-Next-Token"), nil
}

// ListAll returns every sandbox that the query matches, all pages of it.
func (c *Client) ListAll(ctx context.Context, q ListQuery) ([]Info, error) {
	var all []Info
	for {
		page, next, err := c.List(ctx, q)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		if next == "" || next == q.Page {
			return all, nil
		}
		q.Page = next
	}
}

// escape makes s safe for a query; spaces become %20, which survive being decoded
// by rules of paths as well.
func escape(s string) string { return strings.ReplaceAll(url.QueryEscape(s), "+", "%20") }

// seconds rounds up: a time to live of 1.5 s must not end after one.
func seconds(d time.Duration) int64 {
	return int64((d + time.Second - 1) / time.Second)
}
