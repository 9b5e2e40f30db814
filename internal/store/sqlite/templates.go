package sqlite

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/wrenn/wrenn/internal/store"
)

type templates struct{ *Store }

const templateColumns = `id, alias, team_id, public, build_id, cpus, memory_mib, disk_mib, default_user, workdir, envd_version, created, updated, env_vars`

func (s templates) Put(ctx context.Context, t store.Template) error {
	env, err := json.Marshal(t.EnvVars)
	if err != nil {
		return fmt.Errorf("encode environment: %w", err)
	}
	_, err = s.write.ExecContext(ctx, `INSERT INTO templates (`+templateColumns+`)
		VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14)
		ON CONFLICT (id) DO UPDATE SET
			alias = excluded.alias, team_id = excluded.team_id, public = excluded.public,
			build_id = excluded.build_id, cpus = excluded.cpus, memory_mib = excluded.memory_mib,
			disk_mib = excluded.disk_mib, default_user = excluded.default_user, workdir = excluded.workdir,
			envd_version = excluded.envd_version, updated = excluded.updated, env_vars = excluded.env_vars`,
		t.ID, t.Alias, t.TeamID, t.Public, t.BuildID, t.CPUs, t.MemoryMiB, t.DiskMiB,
		t.User, t.Workdir, t.EnvdVersion, nanos(t.Created), nanos(t.Updated), string(env))
	return kind(err, "template")
}

func (s templates) Get(ctx context.Context, id string) (store.Template, error) {
	return scanTemplate(s.read.QueryRowContext(ctx, `SELECT `+templateColumns+` FROM templates WHERE id = $1`, id))
}

func (s templates) GetByAlias(ctx context.Context, alias string) (store.Template, error) {
	return scanTemplate(s.read.QueryRowContext(ctx, `SELECT `+templateColumns+` FROM templates WHERE alias = $1`, alias))
}

func (s templates) ListVisible(ctx context.Context, teamID string) ([]store.Template, error) {
	rows, err := s.read.QueryContext(ctx,
		`SELECT `+templateColumns+` FROM templates WHERE team_id = $1 OR public = $2 ORDER BY created, id`, teamID, true)
	if err != nil {
		return nil, kind(err, "templates")
	}
	defer rows.Close()
	var list []store.Template
	for rows.Next() {
		t, err := scanTemplate(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, t)
	}
	return list, kind(rows.Err(), "templates")
}

func scanTemplate(r row) (store.Template, error) {
	var t store.Template
	var created, updated int64
	var env []byte
	err := r.Scan(&t.ID, &t.Alias, &t.TeamID, &t.Public, &t.BuildID, &t.CPUs, &t.MemoryMiB, &t.DiskMiB,
		&t.User, &t.Workdir, &t.EnvdVersion, &created, &updated, &env)
	if err != nil {
		return t, kind(err, "template")
	}
	t.Created, t.Updated = fromNanos(created), fromNanos(updated)
	if err := json.Unmarshal(env, &t.EnvVars); err != nil {
		return t, fmt.Errorf("decode environment of template %s: %w", t.ID, err)
	}
	return t, nil
}
