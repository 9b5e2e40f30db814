package sqlite

import (
	"context"
	"fmt"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

type events struct{ *Store }

const (
	eventInsertSQL = `INSERT INTO events (sandbox_id, team_id, time, from_state, state, cause, duration)
		VALUES ($1, $2, $3, '', $4, $5, 0)`

	// The event of a transition, written before it: it needs what the record says
	// of the state that is left. The conditions are those of transitionSQL.
	transitionEventSQL = `INSERT INTO events (sandbox_id, team_id, time, from_state, state, cause, duration)
		SELECT id, team_id, ` + notBeforeLast + `, state, $2,
			CASE WHEN CAST($3 AS TEXT) = '' AND state = '` + string(sandbox.Stopping) + `' THEN reason ELSE CAST($3 AS TEXT) END,
			` + notBeforeLast + ` - changed
		FROM sandboxes WHERE id = $4 AND state = $5 AND (CAST($6 AS BIGINT) = 0 OR ends <= CAST($6 AS BIGINT))`

	// notBeforeLast is the time of a transition: clocks can be set back.
	notBeforeLast = `CASE WHEN CAST($1 AS BIGINT) > changed THEN CAST($1 AS BIGINT) ELSE changed END`
)

// firstCause says how a sandbox came to be.
func firstCause(b sandbox.Sandbox) string {
	switch {
	case b.SourceID != "":
		return fmt.Sprintf("forked from %s", b.SourceID)
	case b.Spec.SnapshotID != "":
		return "created from snapshot " + b.Spec.SnapshotID
	}
	return "created"
}

func (s events) List(ctx context.Context, f store.EventFilter) ([]sandbox.Event, error) {
	var where conditions
	if f.SandboxID != "" {
		where.add("sandbox_id = $%d", f.SandboxID)
	}
	if f.TeamID != "" {
		where.add("team_id = $%d", f.TeamID)
	}
	if f.After > 0 {
		where.add("seq > $%d", f.After)
	}
	if f.Before > 0 {
		where.add("seq < $%d", f.Before)
	}
	query := `SELECT seq, sandbox_id, team_id, time, from_state, state, cause, duration FROM events` + where.clause() + ` ORDER BY seq`
	if f.Newest {
		query += " DESC"
	}
	query += where.limit(f.Limit)
	rows, err := s.read.QueryContext(ctx, query, where.args...)
	if err != nil {
		return nil, kind(err, "events")
	}
	defer rows.Close()
	var list []sandbox.Event
	for rows.Next() {
		var e sandbox.Event
		var at, duration int64
		if err := rows.Scan(&e.Seq, &e.SandboxID, &e.TeamID, &at, &e.From, &e.State, &e.Cause, &duration); err != nil {
			return nil, kind(err, "event")
		}
		e.Time, e.Duration = fromNanos(at), time.Duration(duration)
		list = append(list, e)
	}
	return list, kind(rows.Err(), "events")
}

// Purge needs no index on the time, which every transition would pay for: events
// are written as they happen, so the old ones come first.
func (s events) Purge(ctx context.Context, t time.Time) (int64, error) {
	res, err := s.write.ExecContext(ctx, `DELETE FROM events WHERE seq <
		COALESCE((SELECT seq FROM events WHERE time >= $1 ORDER BY seq LIMIT 1), 9223372036854775807)`, nanos(t))
	if err != nil {
		return 0, kind(err, "events")
	}
	return res.RowsAffected()
}
