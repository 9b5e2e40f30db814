// Package logs keeps the guest agent's last log entries in memory, for the host
// to fetch. Nothing in the sandbox has to run or to have room on disk for that.
package logs

import (
	"context"
	"encoding/json"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// DefaultSize bounds a ring, in bytes of encoded entries.
const DefaultSize = 1 << 20

// Entry is one log entry as the host gets it.
type Entry struct {
	Time    time.Time      `json:"time"`
	Level   string         `json:"level"`
	Message string         `json:"message"`
	Fields  map[string]any `json:"fields"`
}

type stored struct {
	at   int64 // unix ns, strictly increasing
	json json.RawMessage
}

// Ring is a bounded list of entries; the oldest give way. Make one with NewRing.
type Ring struct {
	limit int

	mu      sync.Mutex
	entries []stored
	size    int
}

// NewRing returns a ring that holds up to limit bytes of encoded entries.
func NewRing(limit int) *Ring { return &Ring{limit: limit} }

// After returns the encoded entries younger than the instant, given in unix
// nanoseconds, oldest first.
func (r *Ring) After(instant int64) []json.RawMessage {
	r.mu.Lock()
	defer r.mu.Unlock()
	first, _ := slices.BinarySearchFunc(r.entries, instant+1, func(e stored, t int64) int {
		return int(min(max(e.at-t, -1), 1))
	})
	list := make([]json.RawMessage, 0, len(r.entries)-first)
	for _, e := range r.entries[first:] {
		list = append(list, e.json)
	}
	return list
}

func (r *Ring) add(e Entry) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := e.Time.UnixNano()
	// A reader asks for what is younger than the last entry it has: two entries
	// of one instant, or a clock set back, must not hide any from it.
	if n := len(r.entries); n > 0 && at <= r.entries[n-1].at {
		at = r.entries[n-1].at + 1
	}
	e.Time = time.Unix(0, at).UTC()
	data, err := json.Marshal(e)
	if err != nil {
		return err
	}
	r.entries = append(r.entries, stored{at: at, json: data})
	r.size += len(data)
	// Dropped by moving the start: moving the rest would cost every entry of a
	// full ring a copy of all the others.
	for r.size > r.limit && len(r.entries) > 1 {
		r.size -= len(r.entries[0].json)
		r.entries[0] = stored{}
		r.entries = r.entries[1:]
	}
	return nil
}

// Handler returns a slog handler that writes to the ring, entries below level
// left out.
func (r *Ring) Handler(level slog.Leveler) slog.Handler {
	return &handler{ring: r, level: level}
}

type handler struct {
	ring  *Ring
	level slog.Leveler
	group string // prefix of keys, with its dot
	attrs []slog.Attr
}

func (h *handler) Enabled(_ context.Context, level slog.Level) bool {
	return level >= h.level.Level()
}

func (h *handler) Handle(_ context.Context, record slog.Record) error {
	e := Entry{
		Time:    record.Time,
		Level:   strings.ToLower(record.Level.String()),
		Message: record.Message,
		Fields:  make(map[string]any, len(h.attrs)+record.NumAttrs()),
	}
	for _, a := range h.attrs {
		addField(e.Fields, "", a)
	}
	record.Attrs(func(a slog.Attr) bool {
		addField(e.Fields, h.group, a)
		return true
	})
	return h.ring.add(e)
}

func addField(fields map[string]any, prefix string, a slog.Attr) {
	value := a.Value.Resolve()
	if value.Kind() == slog.KindGroup {
		if a.Key != "" {
			prefix += a.Key + "."
		}
		for _, member := range value.Group() {
			addField(fields, prefix, member)
		}
		return
	}
	switch v := value.Any().(type) {
	case error:
		fields[prefix+a.Key] = v.Error()
	case time.Duration:
		fields[prefix+a.Key] = v.String()
	default:
		fields[prefix+a.Key] = v
	}
}

func (h *handler) WithAttrs(attrs []slog.Attr) slog.Handler {
	c := *h
	c.attrs = slices.Clone(h.attrs)
	for _, a := range attrs {
		a.Key = h.group + a.Key
		c.attrs = append(c.attrs, a)
	}
	return &c
}

func (h *handler) WithGroup(name string) slog.Handler {
	c := *h
	c.group += name + "."
	return &c
}
