package sqlite

import (
	"cmp"
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

type sandboxes struct{ *Store }

const (
	sandboxColumns = `id, team_id, host_id, template_id, build_id, alias, cpus, memory_mib, disk_mib, pids,
		metadata, secured, allow_internet, timeout, state, reason, address, envd_version, created, started, ends, ended,
		protected, mask_request_host, auto_pause, auto_pause_memory, auto_resume, memory_kept, snapshot_id, source_id, changed, image_bytes`

	sandboxInsertSQL = `INSERT INTO sandboxes (` + sandboxColumns + `)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24,
			$25, $26, $27, $28, $29, $30, $31, $32)`

	metadataInsertSQL = `INSERT INTO sandbox_metadata (sandbox_id, name, value) VALUES ($1, $2, $3)`

	sandboxGetSQL = `SELECT ` + sandboxColumns + ` FROM sandboxes WHERE id = $1`

	// The casts are for databases that infer the type of a placeholder.
	transitionSQL = `UPDATE sandboxes SET state = $1,
			reason       = COALESCE(NULLIF(CAST($2 AS TEXT), ''), reason),
			address      = COALESCE(NULLIF(CAST($3 AS TEXT), ''), address),
			envd_version = COALESCE(NULLIF(CAST($4 AS TEXT), ''), envd_version),
			started      = COALESCE(NULLIF(CAST($5 AS BIGINT), 0), started),
			ends         = COALESCE(NULLIF(CAST($6 AS BIGINT), 0), ends),
			ended        = COALESCE(NULLIF(CAST($7 AS BIGINT), 0), ended),
			memory_kept  = COALESCE(CAST($8 AS BOOLEAN), memory_kept),
			auto_pause   = COALESCE(CAST($9 AS BOOLEAN), auto_pause),
			image_bytes  = COALESCE(CAST($10 AS BIGINT), image_bytes),
			changed      = CASE WHEN CAST($11 AS BIGINT) > changed THEN CAST($11 AS BIGINT) ELSE changed END
		WHERE id = $12 AND state = $13 AND (CAST($14 AS BIGINT) = 0 OR ends <= CAST($14 AS BIGINT))`
)

func (s sandboxes) Insert(ctx context.Context, b sandbox.Sandbox) error {
	metadata := b.Spec.Metadata
	if metadata == nil {
		metadata = map[string]string{}
	}
	text, err := json.Marshal(metadata)
	if err != nil {
		return fmt.Errorf("encode metadata: %w", err)
	}
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return kind(err, "sandbox")
	}
	defer tx.Rollback() //nolint:errcheck // nothing to undo after a commit
	r := b.Spec.Resources
	_, err = tx.StmtContext(ctx, s.stmts.sandboxInsert).ExecContext(ctx,
		b.ID, b.TeamID, b.HostID, b.Spec.TemplateID, b.Spec.BuildID, b.Alias, r.CPUs, r.MemoryMiB, r.DiskMiB, r.PIDs,
		string(text), b.Spec.Secured, b.Spec.AllowInternetAccess, int64(b.Spec.Timeout), b.State, b.Reason, b.Address,
		b.EnvdVersion, nanos(b.Created), nanos(b.Started), nanos(b.Ends), nanos(b.Ended),
		b.Spec.Protected, b.Spec.MaskRequestHost, b.Spec.AutoPause, b.Spec.AutoPauseMemory, b.Spec.AutoResume,
		b.MemoryKept, b.Spec.SnapshotID, b.SourceID, nanos(or(b.Changed, b.Created)), b.ImageBytes)
	if err != nil {
		return kind(err, "sandbox")
	}
	for name, value := range metadata {
		if _, err := tx.StmtContext(ctx, s.stmts.metadataInsert).ExecContext(ctx, b.ID, name, value); err != nil {
			return kind(err, "sandbox metadata")
		}
	}
	_, err = tx.StmtContext(ctx, s.stmts.eventInsert).ExecContext(ctx, b.ID, b.TeamID, nanos(b.Created), b.State, firstCause(b))
	if err != nil {
		return kind(err, "event")
	}
	return kind(tx.Commit(), "sandbox")
}

func (s sandboxes) Get(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error) {
	return scanSandbox(s.stmts.sandboxGet.QueryRowContext(ctx, id))
}

func (s sandboxes) Transition(ctx context.Context, id sandbox.ID, from sandbox.State, c store.Change) error {
	if !from.CanBecome(c.State) {
		return fmt.Errorf("move sandbox from %q to %q: no such transition", from, c.State)
	}
	at := nanos(or(c.At, or(c.Ended, time.Now())))
	tx, err := s.write.BeginTx(ctx, nil)
	if err != nil {
		return kind(err, "sandbox")
	}
	defer tx.Rollback() //nolint:errcheck // nothing to undo after a commit
	res, err := tx.StmtContext(ctx, s.stmts.transitionEvent).ExecContext(ctx,
		at, c.State, cmp.Or(c.Cause, c.Reason), id, from, nanos(c.IfEndsBy))
	if n, err := affected(res, err); err != nil || n == 0 {
		tx.Rollback() //nolint:errcheck // nothing was written
		return s.changedNone(ctx, id, err)
	}
	res, err = tx.StmtContext(ctx, s.stmts.transition).ExecContext(ctx, c.State, c.Reason, c.Address, c.EnvdVersion,
		nanos(c.Started), nanos(c.Ends), nanos(c.Ended), c.MemoryKept, c.AutoPause, c.ImageBytes, at, id, from, nanos(c.IfEndsBy))
	if n, err := affected(res, err); err != nil || n == 0 {
		tx.Rollback() //nolint:errcheck // the event of a change that somebody else was faster with
		return s.changedNone(ctx, id, err)
	}
	return kind(tx.Commit(), "sandbox")
}

func (s sandboxes) SetEnds(ctx context.Context, id sandbox.ID, ends time.Time) error {
	n, err := affected(s.write.ExecContext(ctx, `UPDATE sandboxes SET ends = $1 WHERE id = $2 AND state = $3`,
		nanos(ends), id, sandbox.Running))
	if err != nil || n == 0 {
		return s.changedNone(ctx, id, err)
	}
	return nil
}

func (s sandboxes) ExtendEnds(ctx context.Context, id sandbox.ID, ends time.Time) (time.Time, error) {
	var now int64
	err := s.write.QueryRowContext(ctx, `UPDATE sandboxes SET ends = CASE WHEN ends < CAST($1 AS BIGINT) THEN CAST($1 AS BIGINT) ELSE ends END
		WHERE id = $2 AND state = $3 RETURNING ends`, nanos(ends), id, sandbox.Running).Scan(&now)
	if errors.Is(err, sql.ErrNoRows) {
		return time.Time{}, s.changedNone(ctx, id, nil)
	}
	return fromNanos(now), kind(err, "sandbox")
}

// changedNone says why an update did not hit the record; err is the update's own.
func (s sandboxes) changedNone(ctx context.Context, id sandbox.ID, err error) error {
	if err != nil {
		return kind(err, "sandbox")
	}
	b, err := s.Get(ctx, id)
	if err != nil {
		return err
	}
	return sandbox.Errorf(sandbox.ErrConflict, "sandbox %q is %s", id, b.State)
}

func affected(res sql.Result, err error) (int64, error) {
	if err != nil {
		return 0, err
	}
	return res.RowsAffected()
}

// or is t, or d when t is zero.
func or(t, d time.Time) time.Time {
	if t.IsZero() {
		return d
	}
	return t
}

func (s sandboxes) NextEnd(ctx context.Context, hostID string) (time.Time, bool, error) {
	var ends sql.NullInt64
	err := s.read.QueryRowContext(ctx, `SELECT MIN(ends) FROM sandboxes WHERE host_id = $1 AND state = $2`,
		hostID, sandbox.Running).Scan(&ends)
	return fromNanos(ends.Int64), ends.Valid, kind(err, "sandboxes")
}

func (s sandboxes) ImageBytes(ctx context.Context, teamID string) (n int64, err error) {
	err = s.read.QueryRowContext(ctx, `SELECT COALESCE(SUM(image_bytes), 0) FROM sandboxes WHERE team_id = $1 AND state IN ($2, $3)`,
		teamID, sandbox.Paused, sandbox.Resuming).Scan(&n)
	return n, kind(err, "sandboxes")
}

func (s sandboxes) Purge(ctx context.Context, t time.Time) (int64, error) {
	res, err := s.write.ExecContext(ctx, `DELETE FROM sandboxes WHERE ended > 0 AND ended < $1 AND state IN ($2, $3)`,
		nanos(t), sandbox.Stopped, sandbox.Failed)
	if err != nil {
		return 0, kind(err, "sandboxes")
	}
	return res.RowsAffected()
}

func scanSandbox(r row) (sandbox.Sandbox, error) {
	var b sandbox.Sandbox
	var metadata string
	var timeout, created, started, ends, ended, changed int64
	res := &b.Spec.Resources
	err := r.Scan(&b.ID, &b.TeamID, &b.HostID, &b.Spec.TemplateID, &b.Spec.BuildID, &b.Alias,
		&res.CPUs, &res.MemoryMiB, &res.DiskMiB, &res.PIDs, &metadata, &b.Spec.Secured, &b.Spec.AllowInternetAccess,
		&timeout, &b.State, &b.Reason, &b.Address, &b.EnvdVersion, &created, &started, &ends, &ended,
		&b.Spec.Protected, &b.Spec.MaskRequestHost, &b.Spec.AutoPause, &b.Spec.AutoPauseMemory, &b.Spec.AutoResume,
		&b.MemoryKept, &b.Spec.SnapshotID, &b.SourceID, &changed, &b.ImageBytes)
	if err != nil {
		return b, kind(err, "sandbox")
	}
	if err := json.Unmarshal([]byte(metadata), &b.Spec.Metadata); err != nil {
		return b, fmt.Errorf("read metadata of sandbox %s: %w", b.ID, err)
	}
	b.Spec.Timeout = time.Duration(timeout)
	b.Created, b.Started, b.Ends, b.Ended = fromNanos(created), fromNanos(started), fromNanos(ends), fromNanos(ended)
	b.Changed = fromNanos(changed)
	return b, nil
}
