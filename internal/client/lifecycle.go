package client

import (
	"context"
	"net/http"
	"net/url"
	"strconv"
	"time"
)

// Pause pauses a sandbox, with its memory or its files only, and returns when it
// takes no memory any more.
func (c *Client) Pause(ctx context.Context, id string, memory bool) error {
	body := struct {
		Memory bool `json:"memory"`
	}{memory}
	_, err := c.call(ctx, "pause sandbox", http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/pause", body, nil)
	return err
}

// ConnectRequest says how a sandbox is to be got running.
type ConnectRequest struct {
	Timeout time.Duration // it lives that long at least; rounded up to seconds; zero: 5 minutes
	Cold    bool          // a paused one starts anew from its files
}

// Connect makes a sandbox run if it is paused, and says whether it was.
func (c *Client) Connect(ctx context.Context, id string, r ConnectRequest) (info Info, resumed bool, err error) {
	body := struct {
		Timeout int64 `json:"timeout,omitempty"`
		Memory  *bool `json:"memory,omitempty"`
	}{Timeout: seconds(r.Timeout)}
	if r.Cold {
		body.Memory = new(bool)
	}
	answer, err := c.call(ctx, "connect to sandbox", http.MethodPost, "/v2/sandboxes/"+url.PathEscape(id)+"/connect", body, &info)
	if err != nil {
		return Info{}, false, err
	}
	return info, answer.status == http.StatusCreated, nil
}

// Fork is one copy of a sandbox, or why it could not be made.
type Fork struct {
	Sandbox Info
	Err     error
}

// Fork makes copies of a sandbox that live for d each. The results are as many as
// were asked for.
func (c *Client) Fork(ctx context.Context, id string, count int, d time.Duration) ([]Fork, error) {
	const op = "fork sandbox"
	body := struct {
		Count   int   `json:"count"`
		Timeout int64 `json:"timeout"`
	}{count, seconds(d)}
	var results []struct {
		Sandbox *Info
		Error   *struct {
			Code    int
			Message string
		}
	}
	if _, err := c.call(ctx, op, http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/fork", body, &results); err != nil {
		return nil, err
	}
	forks := make([]Fork, len(results))
	for i, r := range results {
		switch {
		case r.Error != nil:
			forks[i].Err = &APIError{Op: op, Status: r.Error.Code, Message: r.Error.Message}
		case r.Sandbox != nil:
			forks[i].Sandbox = *r.Sandbox
		default:
			forks[i].Err = &APIError{Op: op, Status: http.StatusInternalServerError, Message: "the platform does not say what became of it"}
		}
	}
	return forks, nil
}

// Snapshot is an image of a sandbox, from which others can be created: its id or
// one of its names is their template.
type Snapshot struct {
	SnapshotID string    `json:"snapshotID"`
	Names      []string  `json:"names"`
	SandboxID  string    `json:"sandboxID"`
	TemplateID string    `json:"templateID"`
	Alias      string    `json:"alias,omitempty"` // of the template
	Kind       string    `json:"kind"`            // memory or files
	SizeBytes  int64     `json:"sizeBytes"`
	CreatedAt  time.Time `json:"createdAt"`
}

// Snapshot makes a snapshot of a sandbox. The name may be empty.
func (c *Client) Snapshot(ctx context.Context, id, name string) (Snapshot, error) {
	body := struct {
		Name string `json:"name,omitempty"`
	}{name}
	var snapshot Snapshot
	_, err := c.call(ctx, "make snapshot", http.MethodPost, "/sandboxes/"+url.PathEscape(id)+"/snapshots", body, &snapshot)
	return snapshot, err
}

// SnapshotQuery says which snapshots to list. The zero value lists all.
type SnapshotQuery struct {
	SandboxID string
	Name      string // or id
}

// Snapshots returns the snapshots that the query matches, newest first, all pages.
func (c *Client) Snapshots(ctx context.Context, q SnapshotQuery) ([]Snapshot, error) {
	values := url.Values{}
	for name, value := range map[string]string{"sandboxID": q.SandboxID, "name": q.Name} {
		if value != "" {
			values.Set(name, value)
		}
	}
	var all []Snapshot
	for {
		var page []Snapshot
		answer, err := c.call(ctx, "list snapshots", http.MethodGet, "/snapshots?"+values.Encode(), nil, &page)
		if err != nil {
			return nil, err
		}
		all = append(all, page...)
		next := answer.header.Get("X-Next-Token")
		if next == "" || next == values.Get("nextToken") {
			return all, nil
		}
		values.Set("nextToken", next)
	}
}

// DeleteSnapshot deletes the snapshot of that id or name. Sandboxes that were
// created from it stay.
func (c *Client) DeleteSnapshot(ctx context.Context, ref string) error {
	_, err := c.call(ctx, "delete snapshot", http.MethodDelete, "/templates/"+url.PathEscape(ref), nil, nil)
	return err
}

// Event is a step in a sandbox's life.
type Event struct {
	Seq        int64     `json:"seq"`
	Time       time.Time `json:"time"`
	SandboxID  string    `json:"sandboxID"`
	From       string    `json:"from"` // state; empty: it was created
	State      string    `json:"state"`
	Cause      string    `json:"cause"`
	DurationMS int64     `json:"durationMs"` // how long it was in From
}

// Duration is how long the sandbox was in the state before.
func (e Event) Duration() time.Duration { return time.Duration(e.DurationMS) * time.Millisecond }

// eventPage is how many events are asked for at a time.
const eventPage = 1000

// Events returns what happened to a sandbox, oldest first, also to one that is gone;
// to all sandboxes when id is empty.
func (c *Client) Events(ctx context.Context, id string) ([]Event, error) {
	path := "/events"
	if id != "" {
		path = "/sandboxes/" + url.PathEscape(id) + "/events"
	}
	var all []Event
	for after := int64(0); ; {
		var page []Event
		query := "?limit=" + strconv.Itoa(eventPage) + "&after=" + strconv.FormatInt(after, 10)
		if _, err := c.call(ctx, "list events", http.MethodGet, path+query, nil, &page); err != nil {
			return nil, err
		}
		all = append(all, page...)
		if len(page) < eventPage {
			return all, nil
		}
		after = page[len(page)-1].Seq
	}
}
