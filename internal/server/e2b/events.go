package e2b

import (
	"math"
	"net/http"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

const (
	maxEvents     = 1000 // in one answer
	defaultEvents = 100
)

type sandboxEvent struct {
	Seq        int64     `json:"seq"`
	Time       time.Time `json:"time"`
	SandboxID  string    `json:"sandboxID"`
	From       string    `json:"from"` // empty: it was created
	State      string    `json:"state"`
	Cause      string    `json:"cause"`
	DurationMS int64     `json:"durationMs"` // how long it was in From
}

// events lists what happened to a sandbox, also to one that is gone.
func (a *api) events(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	f, err := c.eventFilter()
	if err != nil {
		return err
	}
	events, err := a.plane.Events(c.r.Context(), c.team.ID, id, f)
	if err != nil {
		return err
	}
	return writeEvents(c, events)
}

// teamEvents lists what happened to all sandboxes of the team.
func (a *api) teamEvents(c *call) error {
	f, err := c.eventFilter()
	if err != nil {
		return err
	}
	events, err := a.plane.TeamEvents(c.r.Context(), c.team.ID, f)
	if err != nil {
		return err
	}
	return writeEvents(c, events)
}

func writeEvents(c *call, events []sandbox.Event) error {
	list := make([]sandboxEvent, 0, len(events))
	for _, e := range events {
		list = append(list, event(e))
	}
	return writeJSON(c.w, http.StatusOK, list)
}

func event(e sandbox.Event) sandboxEvent {
	return sandboxEvent{
		Seq: e.Seq, Time: timestamp(e.Time), SandboxID: string(e.SandboxID), From: string(e.From), State: string(e.State),
		Cause: e.Cause, DurationMS: e.Duration.Round(time.Millisecond).Milliseconds(),
	}
}

func (c *call) eventFilter() (f store.EventFilter, err error) {
	query, err := c.query()
	if err != nil {
		return f, err
	}
	limit, err := c.integer("limit", defaultEvents, 1, maxEvents)
	if err != nil {
		return f, err
	}
	if f.After, err = c.integer("after", 0, 0, math.MaxInt64); err != nil {
		return f, err
	}
	if f.Before, err = c.integer("before", 0, 1, math.MaxInt64); err != nil {
		return f, err
	}
	f.Limit = int(limit)
	switch order := query.Get("order"); order {
	case "", "asc":
	case "desc":
		f.Newest = true
	default:
		return f, invalid("order: want asc or desc, got %q", clip(order))
	}
	return f, nil
}
