package sqlite

import (
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
		protected, mask_request_host`

	sandboxInsertSQL = `INSERT INTO sandboxes (` + sandboxColumns + `)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24)`

	metadataInsertSQL = `INSERT INTO sandbox_metadata (sandbox_id, name, value) VALUES ($1, $2, $3)`

	sandboxGetSQL = `SELECT ` + sandboxColumns + ` FROM sandboxes WHERE id = $1`

	// The casts are for databases that infer the type of a placeholder.
	transitionSQL = `UPDATE sandboxes SET state = $1,
			reason       = COALESCE(NULLIF(CAST($2 AS TEXT), ''), reason),
			address      = COALESCE(NULLIF(CAST($3 AS TEXT), ''), address),
			envd_version = COALESCE(NULLIF(CAST($4 AS TEXT), ''), envd_version),
			started      = COALESCE(NULLIF(CAST($5 AS BIGINT), 0), started),
			ends         = COALESCE(NULLIF(CAST($6 AS BIGINT), 0), ends),
			ended        = COALESCE(NULLIF(CAST($7 AS BIGINT), 0), ended)
		WHERE id = $8 AND state = $9 AND (CAST($10 AS BIGINT) = 0 OR ends <= CAST($10 AS BIGINT))`
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
		b.Spec.Protected, b.Spec.MaskRequestHost)
	if err != nil {
		return kind(err, "sandbox")
	}
	for name, value := range metadata {
		if _, err := tx.StmtContext(ctx, s.stmts.metadataInsert).ExecContext(ctx, b.ID, name, value); err != nil {
			return kind(err, "sandbox metadata")
		}
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
	res, err := s.stmts.transition.ExecContext(ctx, c.State, c.Reason, c.Address, c.EnvdVersion,
		nanos(c.Started), nanos(c.Ends), nanos(c.Ended), id, from, nanos(c.IfEndsBy))
	return s.changedOne(ctx, id, res, err)
}

func (s sandboxes) SetEnds(ctx context.Context, id sandbox.ID, ends time.Time) error {
	res, err := s.write.ExecContext(ctx, `UPDATE sandboxes SET ends = $1 WHERE id = $2 AND state = $3`,
		nanos(ends), id, sandbox.Running)
	return s.changedOne(ctx, id, res, err)
}

func (s sandboxes) ExtendEnds(ctx context.Context, id sandbox.ID, ends time.Time) (time.Time, error) {
	var now int64
	err := s.write.QueryRowContext(ctx, `UPDATE sandboxes SET ends = CASE WHEN ends < CAST($1 AS BIGINT) THEN CAST($1 AS BIGINT) ELSE ends END
		WHERE id = $2 AND state = $3 RETURNING ends`, nanos(ends), id, sandbox.Running).Scan(&now)
	if errors.Is(err, sql.ErrNoRows) {
		return time.Time{}, s.changedNone(ctx, id)
	}
	return fromNanos(now), kind(err, "sandbox")
}

// changedOne says why an update that should have hit one record did not.
func (s sandboxes) changedOne(ctx context.Context, id sandbox.ID, res sql.Result, err error) error {
	if err != nil {
		return kind(err, "sandbox")
	}
	if n, err := res.RowsAffected(); err != nil || n == 1 {
		return kind(err, "sandbox")
	}
	return s.changedNone(ctx, id)
}

func (s sandboxes) changedNone(ctx context.Context, id sandbox.ID) error {
	b, err := s.Get(ctx, id)
	if err != nil {
		return err
	}
	return sandbox.Errorf(sandbox.ErrConflict, "sandbox %q is %s", id, b.State)
}

func (s sandboxes) NextEnd(ctx context.Context, hostID string) (time.Time, bool, error) {
	var ends sql.NullInt64
	err := s.read.QueryRowContext(ctx, `SELECT MIN(ends) FROM sandboxes WHERE host_id = $1 AND state = $2`,
		hostID, sandbox.Running).Scan(&ends)
	return fromNanos(ends.Int64), ends.Valid, kind(err, "sandboxes")
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
	var timeout, created, started, ends, ended int64
	res := &b.Spec.Resources
	err := r.Scan(&b.ID, &b.TeamID, &b.HostID, &b.Spec.TemplateID, &b.Spec.BuildID, &b.Alias,
		&res.CPUs, &res.MemoryMiB, &res.DiskMiB, &res.PIDs, &metadata, &b.Spec.Secured, &b.Spec.AllowInternetAccess,
		&timeout, &b.State, &b.Reason, &b.Address, &b.EnvdVersion, &created, &started, &ends, &ended,
		&b.Spec.Protected, &b.Spec.MaskRequestHost)
	if err != nil {
		return b, kind(err, "sandbox")
	}
	if err := json.Unmarshal([]byte(metadata), &b.Spec.Metadata); err != nil {
		return b, fmt.Errorf("read metadata of sandbox %s: %w", b.ID, err)
	}
	b.Spec.Timeout = time.Duration(timeout)
	b.Created, b.Started, b.Ends, b.Ended = fromNanos(created), fromNanos(started), fromNanos(ends), fromNanos(ended)
	return b, nil
}
