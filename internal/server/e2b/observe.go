package e2b

import (
	"encoding/json"
	"math"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/controlplane"
	"github.com/wrenn/wrenn/internal/sandbox"
)

type sandboxMetric struct {
	Timestamp     time.Time `json:"timestamp"`
	TimestampUnix int64     `json:"timestampUnix"`
	CPUCount      int       `json:"cpuCount"`
	CPUUsedPct    float64   `json:"cpuUsedPct"`
	MemUsed       int64     `json:"memUsed"`
	MemTotal      int64     `json:"memTotal"`
	MemCache      int64     `json:"memCache"`
	DiskUsed      int64     `json:"diskUsed"`
	DiskTotal     int64     `json:"diskTotal"`
}

func metric(m controlplane.Metric) sandboxMetric {
	pct := m.CPUUsedPct
	if math.IsNaN(pct) || math.IsInf(pct, 0) {
		pct = 0 // JSON has no such numbers
	}
	return sandboxMetric{
		Timestamp: timestamp(m.Time), TimestampUnix: m.Time.Unix(), CPUCount: m.CPUCount, CPUUsedPct: pct,
		MemUsed: m.MemUsed, MemTotal: m.MemTotal, MemCache: m.MemCache, DiskUsed: m.DiskUsed, DiskTotal: m.DiskTotal,
	}
}

const (
	maxUnix   = 1 << 33               // seconds; in the year 2242
	maxMillis = maxUnix * int64(1000) // the same
	maxOfMany = 100                   // sandboxes in one metrics request
	maxLogs   = 1000                  // entries in one answer
	maxSearch = 256                   // bytes
)

func (a *api) metrics(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	start, err := c.integer("start", 0, 0, maxUnix)
	if err != nil {
		return err
	}
	end, err := c.integer("end", 0, 0, maxUnix)
	if err != nil {
		return err
	}
	if start != 0 && end != 0 && start > end {
		return invalid("start is after end")
	}
	var from, to time.Time
	if start != 0 {
		from = time.Unix(start, 0)
	}
	if end != 0 {
		to = time.Unix(end, 0).Add(time.Second - 1) // the whole second
	}
	points, err := a.plane.Metrics(c.r.Context(), c.team.ID, id, from, to)
	if err != nil {
		return err
	}
	list := make([]sandboxMetric, 0, len(points))
	for _, p := range points {
		list = append(list, metric(p))
	}
	return writeJSON(c.w, http.StatusOK, list)
}

func (a *api) metricsOfMany(c *call) error {
	query, err := c.query()
	if err != nil {
		return err
	}
	given := strings.Split(strings.Join(query["sandbox_ids"], ","), ",")
	if len(given) == 1 && given[0] == "" {
		return invalid("sandbox_ids is missing")
	}
	if len(given) > maxOfMany {
		return invalid("sandbox_ids: at most %d at once", maxOfMany)
	}
	names := make(map[sandbox.ID]string, len(given)) // as the client calls them
	var ids []sandbox.ID
	for _, g := range given {
		plain, _, _ := strings.Cut(g, "-")
		id, err := sandbox.ParseID(plain)
		if err != nil {
			continue // like any other that there is not
		}
		if _, twice := names[id]; !twice {
			ids = append(ids, id)
		}
		names[id] = g
	}
	latest, err := a.plane.LatestMetrics(c.r.Context(), c.team.ID, ids)
	if err != nil {
		return err
	}
	sandboxes := make(map[string]sandboxMetric, len(latest))
	for id, m := range latest {
		sandboxes[names[id]] = metric(m)
	}
	return writeJSON(c.w, http.StatusOK, map[string]any{"sandboxes": sandboxes})
}

type logLine struct {
	Timestamp time.Time `json:"timestamp"`
	Line      string    `json:"line"` // JSON again: clients parse it
}

type logEntry struct {
	Timestamp time.Time         `json:"timestamp"`
	Message   string            `json:"message"`
	Level     string            `json:"level"`
	Fields    map[string]string `json:"fields"`
}

// levels in ascending order.
var levels = []string{"debug", "info", "warn", "error"}

func entry(e controlplane.LogEntry) logEntry {
	out := logEntry{Timestamp: timestamp(e.Time), Message: e.Message, Level: e.Level, Fields: e.Fields}
	if !slices.Contains(levels, out.Level) {
		out.Level = "info"
	}
	if out.Fields == nil {
		out.Fields = map[string]string{}
	}
	return out
}

func line(e logEntry) (logLine, error) {
	fields := map[string]string{}
	for name, value := range e.Fields {
		fields[name] = value
	}
	fields["level"], fields["message"], fields["timestamp"] = e.Level, e.Message, e.Timestamp.Format(time.RFC3339Nano)
	text, err := json.Marshal(fields)
	return logLine{Timestamp: e.Timestamp, Line: string(text)}, err
}

func (a *api) logsV1(c *call) error {
	start, err := c.integer("start", 0, 0, maxMillis)
	if err != nil {
		return err
	}
	limit, err := c.integer("limit", maxLogs, 0, math.MaxInt32)
	if err != nil {
		return err
	}
	entries, err := a.logs(c, start)
	if err != nil {
		return err
	}
	entries = entries[:min(len(entries), int(min(limit, maxLogs)))]
	lines := make([]logLine, 0, len(entries))
	for _, e := range entries {
		l, err := line(e)
		if err != nil {
			return err
		}
		lines = append(lines, l)
	}
	return writeJSON(c.w, http.StatusOK, map[string]any{"logs": lines, "logEntries": entries})
}

func (a *api) logsV2(c *call) error {
	query, err := c.query()
	if err != nil {
		return err
	}
	cursor, err := c.integer("cursor", 0, 0, maxMillis)
	if err != nil {
		return err
	}
	limit, err := c.integer("limit", maxLogs, 0, maxLogs)
	if err != nil {
		return err
	}
	direction := query.Get("direction")
	if direction != "" && direction != "forward" && direction != "backward" {
		return invalid("direction: want forward or backward, got %q", clip(direction))
	}
	level, search := query.Get("level"), query.Get("search")
	if level != "" && !slices.Contains(levels, level) {
		return invalid("level: want one of %s, got %q", strings.Join(levels, ", "), clip(level))
	}
	if len(search) > maxSearch {
		return invalid("search: longer than %d bytes", maxSearch)
	}
	// Forward means from the cursor on, backward what was up to it, newest first.
	backward := direction != "forward"
	from := cursor
	if backward {
		from = 0
	}
	entries, err := a.logs(c, from)
	if err != nil {
		return err
	}
	entries = slices.DeleteFunc(entries, func(e logEntry) bool {
		return slices.Index(levels, e.Level) < slices.Index(levels, level) ||
			!strings.Contains(e.Message, search) ||
			(backward && cursor != 0 && e.Timestamp.UnixMilli() > cursor)
	})
	if backward {
		slices.Reverse(entries)
	}
	return writeJSON(c.w, http.StatusOK, map[string]any{"logs": entries[:min(len(entries), int(limit))]})
}

// logs returns the log of the request's sandbox from a time in milliseconds on.
func (a *api) logs(c *call, from int64) ([]logEntry, error) {
	id, err := c.sandboxID()
	if err != nil {
		return nil, err
	}
	raw, err := a.plane.Logs(c.r.Context(), c.team.ID, id, time.UnixMilli(from))
	if err != nil {
		return nil, err
	}
	entries := make([]logEntry, 0, len(raw))
	for _, e := range raw {
		entries = append(entries, entry(e))
	}
	return entries, nil
}
