package e2b

import (
	"encoding/base64"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

const maxPage = 100

// listV1 is the first generation's list: what runs, on one page.
func (a *api) listV1(c *call) error {
	query, err := c.query()
	if err != nil {
		return err
	}
	f := store.Filter{States: []sandbox.State{sandbox.Running}}
	if f.Metadata, err = parseMetadata(query.Get("metadata")); err != nil {
		return err
	}
	boxes, err := a.plane.List(c.r.Context(), c.team.ID, f)
	if err != nil {
		return err
	}
	return a.writeList(c, boxes)
}

func (a *api) listV2(c *call) error {
	query, err := c.query()
	if err != nil {
		return err
	}
	f, running, err := parseFilter(query)
	if err != nil {
		return err
	}
	limit, err := c.integer("limit", maxPage, 1, maxPage)
	if err != nil {
		return err
	}
	if running {
		count := f
		count.After, count.States = nil, []sandbox.State{sandbox.Running}
		total, err := a.plane.Count(c.r.Context(), c.team.ID, count)
		if err != nil {
			return err
		}
		c.w.Header().Set("X-Total-Running", strconv.Itoa(total))
	}
	f.Limit = int(limit) + 1 // one more tells whether there is a next page
	boxes, err := a.plane.List(c.r.Context(), c.team.ID, f)
	if err != nil {
		return err
	}
	if len(boxes) > int(limit) {
		boxes = boxes[:limit]
		last := boxes[limit-1]
		c.w.Header().Set("X-Next-Token", formatToken(store.Cursor{Started: last.Started, ID: last.ID}))
	}
	return a.writeList(c, boxes)
}

func (a *api) writeList(c *call, boxes []sandbox.Sandbox) error {
	list := make([]listedSandbox, 0, len(boxes))
	for _, b := range boxes {
		list = append(list, a.listed(b))
	}
	return writeJSON(c.w, http.StatusOK, list)
}

func (c *call) query() (url.Values, error) {
	query, err := url.ParseQuery(c.r.URL.RawQuery)
	if err != nil {
		return nil, invalid("malformed query")
	}
	return query, nil
}

// pausedStates are what E2B's clients, which know two states, are told to be paused:
// all in which there is nobody to talk to until it is resumed.
var pausedStates = []sandbox.State{sandbox.Pausing, sandbox.Paused, sandbox.Resuming}

// parseFilter reads the query of the second generation's list; running is false
// when it asks for paused ones only.
func parseFilter(query url.Values) (f store.Filter, running bool, err error) {
	if f.Metadata, err = parseMetadata(query.Get("metadata")); err != nil {
		return f, false, err
	}
	states := []string{"running", "paused"}
	if text := strings.Join(query["state"], ","); text != "" {
		states = strings.Split(text, ",")
	}
	for _, s := range states {
		switch s {
		case "running":
			f.States = append(f.States, sandbox.Running)
		case "paused":
			f.States = append(f.States, pausedStates...)
		default:
			return f, false, invalid("state: want running or paused, got %q", clip(s))
		}
	}
	running = slices.Contains(states, "running")
	switch order := query.Get("order"); order {
	case "", "desc":
	case "asc":
		f.Ascending = true
	default:
		return f, false, invalid("order: want asc or desc, got %q", clip(order))
	}
	if text := query.Get("startedAfter"); text != "" {
		// An unescaped "+" of a time zone arrives as a space.
		if f.StartedAfter, err = time.Parse(time.RFC3339, strings.ReplaceAll(text, " ", "+")); err != nil {
			return f, false, invalid("startedAfter: want a time like 2006-01-02T15:04:05Z, got %q", clip(text))
		}
		if y := f.StartedAfter.Year(); y < 1970 || y > 2200 {
			return f, false, invalid("startedAfter: the year %d is out of range", y)
		}
	}
	// "[team/]alias[:default]" is what templates are also called by.
	f.Template = strings.TrimSuffix(query.Get("template"), ":default")
	if _, alias, found := strings.Cut(f.Template, "/"); found {
		f.Template = alias
	}
	if token := query.Get("nextToken"); token != "" {
		cursor, err := parseToken(token)
		if err != nil {
			return f, false, err
		}
		f.After = &cursor
	}
	return f, running, nil
}

// parseMetadata reads a metadata filter as it is after the query's own decoding.
// Clients encode names and values, the whole, and then the query.
func parseMetadata(text string) (map[string]string, error) {
	if text == "" {
		return nil, nil
	}
	malformed := invalid("metadata: want name=value pairs joined by &, each name and value URL-encoded")
	once, err := url.QueryUnescape(text)
	if err != nil {
		return nil, malformed
	}
	pairs := strings.Split(once, "&")
	if len(pairs) > 64 {
		return nil, invalid("metadata: more than 64 pairs to filter by")
	}
	metadata := make(map[string]string, len(pairs))
	for _, pair := range pairs {
		rawName, rawValue, found := strings.Cut(pair, "=")
		name, err1 := url.QueryUnescape(rawName)
		value, err2 := url.QueryUnescape(rawValue)
		if !found || err1 != nil || err2 != nil || strings.Contains(name+value, "\x00") {
			return nil, malformed
		}
		metadata[name] = value
	}
	return metadata, nil
}

// formatToken makes the opaque text for the place where the next page begins.
func formatToken(c store.Cursor) string {
	return base64.RawURLEncoding.EncodeToString([]byte(strconv.FormatInt(c.Started.UnixNano(), 10) + " " + string(c.ID)))
}

func parseToken(token string) (store.Cursor, error) {
	malformed := invalid("nextToken: not one that this server gave out")
	plain, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil {
		return store.Cursor{}, malformed
	}
	nanos, rest, _ := strings.Cut(string(plain), " ")
	n, err1 := strconv.ParseInt(nanos, 10, 64)
	id, err2 := sandbox.ParseID(rest)
	if err1 != nil || err2 != nil || n <= 0 {
		return store.Cursor{}, malformed
	}
	return store.Cursor{Started: time.Unix(0, n).UTC(), ID: id}, nil
}
