package controlplane

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/wrenn/wrenn/api/proto/hostagent"
	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// Get returns the team's sandbox. For one that has ended or is ending it gives
// sandbox.ErrNotFound with words that say how it ended.
func (c *ControlPlane) Get(ctx context.Context, teamID string, id sandbox.ID) (sandbox.Sandbox, error) {
	b, err := c.owned(ctx, teamID, id)
	if err == nil && (b.State.Final() || b.State == sandbox.Stopping) {
		err = errGone(b)
	}
	return b, err
}

// List returns the team's sandboxes that the filter picks; its TeamID is ignored.
func (c *ControlPlane) List(ctx context.Context, teamID string, f store.Filter) ([]sandbox.Sandbox, error) {
	f.TeamID = teamID
	return c.boxes.List(ctx, f)
}

// Count returns how many of the team's sandboxes the filter picks.
func (c *ControlPlane) Count(ctx context.Context, teamID string, f store.Filter) (int, error) {
	f.TeamID = teamID
	return c.boxes.Count(ctx, f)
}

// A Metric is one measurement of a sandbox. Sizes are in bytes.
type Metric struct {
	Time                        time.Time
	CPUCount                    int
	CPUUsedPct                  float64 // 100: one CPU fully used
	MemUsed, MemTotal, MemCache int64
	DiskUsed, DiskTotal         int64
}

// Metrics returns what was measured of the team's sandbox, oldest first. Zero
// times do not bound.
func (c *ControlPlane) Metrics(ctx context.Context, teamID string, id sandbox.ID, start, end time.Time) ([]Metric, error) {
	if _, err := c.Get(ctx, teamID, id); err != nil {
		return nil, err
	}
	req := &hostagent.GetMetricsRequest{SandboxIds: []string{string(id)}}
	if !start.IsZero() {
		req.Start = timestamppb.New(start)
	}
	if !end.IsZero() {
		req.End = timestamppb.New(end)
	}
	series, err := c.metrics(ctx, req)
	return series[id], err
}

// LatestMetrics returns the last measurement of each of the sandboxes; those that
// are not the team's or have none yet are left out.
func (c *ControlPlane) LatestMetrics(ctx context.Context, teamID string, ids []sandbox.ID) (map[sandbox.ID]Metric, error) {
	req := &hostagent.GetMetricsRequest{LatestOnly: true}
	for _, id := range ids {
		switch _, err := c.Get(ctx, teamID, id); {
		case err == nil:
			req.SandboxIds = append(req.SandboxIds, string(id))
		case !errors.Is(err, sandbox.ErrNotFound):
			return nil, err
		}
	}
	latest := make(map[sandbox.ID]Metric)
	if len(req.SandboxIds) == 0 {
		return latest, nil
	}
	series, err := c.metrics(ctx, req)
	for id, s := range series {
		if len(s) > 0 {
			latest[id] = s[len(s)-1]
		}
	}
	return latest, err
}

func (c *ControlPlane) metrics(ctx context.Context, req *hostagent.GetMetricsRequest) (map[sandbox.ID][]Metric, error) {
	resp, err := c.cfg.Agent.GetMetrics(ctx, req)
	if err != nil {
		return nil, agentError("get metrics", err)
	}
	series := make(map[sandbox.ID][]Metric, len(resp.GetSeries()))
	for id, s := range resp.GetSeries() {
		for _, v := range s.GetSamples() {
			series[sandbox.ID(id)] = append(series[sandbox.ID(id)], Metric{
				Time: v.GetTime().AsTime(), CPUCount: int(v.GetCpuCount()), CPUUsedPct: v.GetCpuUsedPct(),
				MemUsed: v.GetMemUsed(), MemTotal: v.GetMemTotal(), MemCache: v.GetMemCache(),
				DiskUsed: v.GetDiskUsed(), DiskTotal: v.GetDiskTotal(),
			})
		}
	}
	return series, nil
}

// A LogEntry is one line of a sandbox's log.
type LogEntry struct {
	Time    time.Time
	Level   string // debug, info, warn, error
	Message string
	Fields  map[string]string
}

// Logs returns the log of the team's sandbox from a time on, oldest first. It
// also has what is left of one that has ended, closed by a line that says how.
func (c *ControlPlane) Logs(ctx context.Context, teamID string, id sandbox.ID, from time.Time) ([]LogEntry, error) {
	b, err := c.owned(ctx, teamID, id)
	if err != nil {
		return nil, err
	}
	var entries []LogEntry
	resp, err := c.cfg.Agent.GetLogs(ctx, &hostagent.GetLogsRequest{SandboxId: string(id)})
	if err != nil {
		// An ended sandbox's log is there while the agent remembers it.
		if err := agentError("get logs", err); !b.State.Final() && !errors.Is(err, sandbox.ErrNotFound) {
			return nil, err
		}
	}
	for _, e := range resp.GetEntries() {
		entries = append(entries, LogEntry{Time: e.GetTime().AsTime(), Level: e.GetLevel(), Message: e.GetMessage(), Fields: e.GetFields()})
	}
	if b.State.Final() {
		end := LogEntry{Time: b.Ended, Level: "info", Message: fmt.Sprintf("sandbox ended: %s", b.Reason), Fields: map[string]string{"logger": "wrenn"}}
		if b.State == sandbox.Failed {
			end.Level = "error"
		}
		entries = append(entries, end)
	}
	return slices.DeleteFunc(entries, func(e LogEntry) bool { return e.Time.Before(from) }), nil
}
