package sqlite

import (
	"context"
	"fmt"
	"strings"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

func (s sandboxes) List(ctx context.Context, f store.Filter) ([]sandbox.Sandbox, error) {
	where, args := conditions(f)
	direction, beyond := "DESC", "<"
	if f.Ascending {
		direction, beyond = "ASC", ">"
	}
	if f.After != nil {
		args = append(args, nanos(f.After.Started), f.After.ID)
		where = append(where, fmt.Sprintf("(started, id) %s ($%d, $%d)", beyond, len(args)-1, len(args)))
	}
	query := `SELECT ` + sandboxColumns + ` FROM sandboxes` + clause(where) +
		` ORDER BY started ` + direction + `, id ` + direction
	if f.Limit > 0 {
		args = append(args, f.Limit)
		query += fmt.Sprintf(" LIMIT $%d", len(args))
	}
	rows, err := s.read.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, kind(err, "sandboxes")
	}
	defer rows.Close()
	var list []sandbox.Sandbox
	for rows.Next() {
		b, err := scanSandbox(rows)
		if err != nil {
			return nil, err
		}
		list = append(list, b)
	}
	return list, kind(rows.Err(), "sandboxes")
}

func (s sandboxes) Count(ctx context.Context, f store.Filter) (int, error) {
	where, args := conditions(f)
	var n int
	err := s.read.QueryRowContext(ctx, `SELECT COUNT(*) FROM sandboxes`+clause(where), args...).Scan(&n)
	return n, kind(err, "sandboxes")
}

// conditions are the filters of f that do not depend on an order.
func conditions(f store.Filter) (where []string, args []any) {
	add := func(format string, values ...any) {
		places := make([]any, len(values))
		for i, v := range values {
			args = append(args, v)
			places[i] = len(args)
		}
		where = append(where, fmt.Sprintf(format, places...))
	}
	if f.TeamID != "" {
		add("team_id = $%d", f.TeamID)
	}
	if f.HostID != "" {
		add("host_id = $%d", f.HostID)
	}
	if len(f.States) > 0 {
		states := make([]any, len(f.States))
		for i, st := range f.States {
			states[i] = st
		}
		add("state IN ($%d"+strings.Repeat(", $%d", len(states)-1)+")", states...)
	}
	if f.Template != "" {
		add("(template_id = $%d OR alias = $%d)", f.Template, f.Template)
	}
	if !f.StartedAfter.IsZero() {
		add("started >= $%d", nanos(f.StartedAfter))
	}
	if !f.EndsBy.IsZero() {
		add("ends <= $%d", nanos(f.EndsBy))
	}
	for name, value := range f.Metadata {
		add("EXISTS (SELECT 1 FROM sandbox_metadata m WHERE m.sandbox_id = sandboxes.id AND m.name = $%d AND m.value = $%d)", name, value)
	}
	return where, args
}

func clause(where []string) string {
	if len(where) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(where, " AND ")
}
