package sqlite

import (
	"context"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

type snapshots struct{ *Store }

const snapshotColumns = `id, team_id, host_id, name, sandbox_id, template_id, build_id, alias, cpus, memory_mib, disk_mib, pids,
	secured, allow_internet, kind, default_user, workdir, envd_version, size_bytes, state, created`

func (s snapshots) Insert(ctx context.Context, n store.Snapshot) error {
	r := n.Resources
	_, err := s.write.ExecContext(ctx, `INSERT INTO snapshots (`+snapshotColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $20, $21)`,
		n.ID, n.TeamID, n.HostID, n.Name, n.SandboxID, n.TemplateID, n.BuildID, n.Alias, r.CPUs, r.MemoryMiB, r.DiskMiB, r.PIDs,
		n.Secured, n.AllowInternet, n.Kind, n.User, n.Workdir, n.EnvdVersion, n.SizeBytes, n.State, nanos(n.Created))
	return kind(err, "snapshot")
}

func (s snapshots) Get(ctx context.Context, id string) (store.Snapshot, error) {
	return scanSnapshot(s.read.QueryRowContext(ctx, `SELECT `+snapshotColumns+` FROM snapshots WHERE id = $1`, id))
}

func (s snapshots) GetByName(ctx context.Context, teamID, name string) (store.Snapshot, error) {
	return scanSnapshot(s.read.QueryRowContext(ctx, `SELECT `+snapshotColumns+` FROM snapshots
		WHERE team_id = $1 AND name = $2 AND state = $3 ORDER BY created DESC, id DESC LIMIT 1`, teamID, name, store.SnapshotReady))
}

func (s snapshots) List(ctx context.Context, f store.SnapshotFilter) ([]store.Snapshot, error) {
	var where conditions
	if f.TeamID != "" {
		where.add("team_id = $%d", f.TeamID)
	}
	if f.HostID != "" {
		where.add("host_id = $%d", f.HostID)
	}
	if f.SandboxID != "" {
		where.add("sandbox_id = $%d", f.SandboxID)
	}
	if f.Ref != "" {
		where.add("(id = $%d OR name = $%d)", f.Ref, f.Ref)
	}
	if len(f.States) > 0 {
		addIn(&where, "state", f.States)
	}
	if f.After != nil {
		where.add("(created, id) < ($%d, $%d)", nanos(f.After.Created), f.After.ID)
	}
	query := `SELECT ` + snapshotColumns + ` FROM snapshots` + where.clause() + ` ORDER BY created DESC, id DESC` + where.limit(f.Limit)
	rows, err := s.read.QueryContext(ctx, query, where.args...)
	if err != nil {
		return nil, kind(err, "snapshots")
	}
	defer rows.Close()
	var list []store.Snapshot
	for rows.Next() {
		n, err := scanSnapshot(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, n)
	}
	return list, kind(rows.Err(), "snapshots")
}

func (s snapshots) SetState(ctx context.Context, id string, from, to store.SnapshotState, sizeBytes int64) error {
	n, err := affected(s.write.ExecContext(ctx, `UPDATE snapshots SET state = $1,
			size_bytes = COALESCE(NULLIF(CAST($2 AS BIGINT), 0), size_bytes) WHERE id = $3 AND state = $4`,
		to, sizeBytes, id, from))
	if err != nil || n > 0 {
		return kind(err, "snapshot")
	}
	now, err := s.Get(ctx, id)
	if err != nil {
		return err
	}
	return sandbox.Errorf(sandbox.ErrConflict, "snapshot %q is %s", id, now.State)
}

func (s snapshots) Delete(ctx context.Context, id string) error {
	n, err := affected(s.write.ExecContext(ctx, `DELETE FROM snapshots WHERE id = $1`, id))
	if err == nil && n == 0 {
		return sandbox.Errorf(sandbox.ErrNotFound, "snapshot not found")
	}
	return kind(err, "snapshot")
}

func (s snapshots) TeamBytes(ctx context.Context, teamID string) (int64, error) {
	var sum int64
	err := s.read.QueryRowContext(ctx, `SELECT CAST(COALESCE(SUM(size_bytes), 0) AS BIGINT) FROM snapshots
		WHERE team_id = $1 AND state = $2`, teamID, store.SnapshotReady).Scan(&sum)
	return sum, kind(err, "snapshots")
}

func scanSnapshot(r row) (store.Snapshot, error) {
	var n store.Snapshot
	var created int64
	res := &n.Resources
	err := r.Scan(&n.ID, &n.TeamID, &n.HostID, &n.Name, &n.SandboxID, &n.TemplateID, &n.BuildID, &n.Alias,
		&res.CPUs, &res.MemoryMiB, &res.DiskMiB, &res.PIDs, &n.Secured, &n.AllowInternet, &n.Kind, &n.User, &n.Workdir,
		&n.EnvdVersion, &n.SizeBytes, &n.State, &created)
	n.Created = fromNanos(created)
	return n, kind(err, "snapshot")
}
