package sqlite

import (
	"context"
	"encoding/hex"
	"fmt"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

type row interface{ Scan(dest ...any) error }

type teams struct{ *Store }

func (s teams) Insert(ctx context.Context, t store.Team) error {
	_, err := s.write.ExecContext(ctx, `INSERT INTO teams (id, slug, name, created) VALUES ($1, $2, $3, $4)`,
		t.ID, t.Slug, t.Name, nanos(t.Created))
	return kind(err, "team")
}

func (s teams) Get(ctx context.Context, id string) (store.Team, error) {
	return scanTeam(s.read.QueryRowContext(ctx, `SELECT id, slug, name, created FROM teams WHERE id = $1`, id))
}

func (s teams) GetBySlug(ctx context.Context, slug string) (store.Team, error) {
	return scanTeam(s.read.QueryRowContext(ctx, `SELECT id, slug, name, created FROM teams WHERE slug = $1`, slug))
}

func scanTeam(r row) (store.Team, error) {
	var t store.Team
	var created int64
	err := r.Scan(&t.ID, &t.Slug, &t.Name, &created)
	t.Created = fromNanos(created)
	return t, kind(err, "team")
}

type apiKeys struct{ *Store }

func (s apiKeys) Insert(ctx context.Context, k store.APIKey) error {
	_, err := s.write.ExecContext(ctx, `INSERT INTO api_keys (id, team_id, name, hash, created) VALUES ($1, $2, $3, $4, $5)`,
		k.ID, k.TeamID, k.Name, hex.EncodeToString(k.Hash[:]), nanos(k.Created))
	return kind(err, "API key")
}

func (s apiKeys) GetByHash(ctx context.Context, hash [32]byte) (store.APIKey, error) {
	return scanAPIKey(s.read.QueryRowContext(ctx,
		`SELECT id, team_id, name, hash, created FROM api_keys WHERE hash = $1`, hex.EncodeToString(hash[:])))
}

func (s apiKeys) List(ctx context.Context, teamID string) ([]store.APIKey, error) {
	rows, err := s.read.QueryContext(ctx,
		`SELECT id, team_id, name, hash, created FROM api_keys WHERE team_id = $1 ORDER BY created, id`, teamID)
	if err != nil {
		return nil, kind(err, "API keys")
	}
	defer rows.Close()
	var keys []store.APIKey
	for rows.Next() {
		k, err := scanAPIKey(rows)
		if err != nil {
			return nil, err
		}
		keys = append(keys, k)
	}
	return keys, kind(rows.Err(), "API keys")
}

func (s apiKeys) Delete(ctx context.Context, teamID, id string) error {
	res, err := s.write.ExecContext(ctx, `DELETE FROM api_keys WHERE id = $1 AND team_id = $2`, id, teamID)
	if err != nil {
		return kind(err, "API key")
	}
	if n, err := res.RowsAffected(); err != nil || n == 0 {
		return sandbox.Errorf(sandbox.ErrNotFound, "API key not found")
	}
	return nil
}

func scanAPIKey(r row) (store.APIKey, error) {
	var k store.APIKey
	var hash string
	var created int64
	if err := r.Scan(&k.ID, &k.TeamID, &k.Name, &hash, &created); err != nil {
		return k, kind(err, "API key")
	}
	if n, err := hex.Decode(k.Hash[:], []byte(hash)); err != nil || n != len(k.Hash) {
		return k, fmt.Errorf("read API key %s: its hash is damaged", k.ID)
	}
	k.Created = fromNanos(created)
	return k, nil
}
