package sqlite

import (
	"context"
	"fmt"
	"strings"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

func (s sandboxes) List(ctx context.Context, f store.Filter) ([]sandbox.Sandbox, error) {
	where := sandboxConditions(f)
	direction, beyond := "DESC", "<"
	if f.Ascending {
		direction, beyond = "ASC", ">"
	}
	if f.After != nil {
		where.add("(started, id) "+beyond+" ($%d, $%d)", nanos(f.After.Started), f.After.ID)
	}
	query := `SELECT ` + sandboxColumns + ` FROM sandboxes` + where.clause() +
		` ORDER BY started ` + direction + `, id ` + direction + where.limit(f.Limit)
	rows, err := s.read.QueryContext(ctx, query, where.args...)
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
	where := sandboxConditions(f)
	var n int
	err := s.read.QueryRowContext(ctx, `SELECT COUNT(*) FROM sandboxes`+where.clause(), where.args...).Scan(&n)
	return n, kind(err, "sandboxes")
}

// sandboxConditions are the filters of f that do not depend on an order.
func sandboxConditions(f store.Filter) conditions {
	var where conditions
	if f.TeamID != "" {
		where.add("team_id = $%d", f.TeamID)
	}
	if f.HostID != "" {
		where.add("host_id = $%d", f.HostID)
	}
	if len(f.States) > 0 {
		addIn(&where, "state", f.States)
	}
	if f.Template != "" {
		where.add("(template_id = $%d OR snapshot_id = $%d OR alias = $%d)", f.Template, f.Template, f.Template)
	}
	if !f.StartedAfter.IsZero() {
		where.add("started >= $%d", nanos(f.StartedAfter))
	}
	if !f.EndsBy.IsZero() {
		where.add("ends <= $%d", nanos(f.EndsBy))
	}
	for name, value := range f.Metadata {
		where.add("EXISTS (SELECT 1 FROM sandbox_metadata m WHERE m.sandbox_id = sandboxes.id AND m.name = $%d AND m.value = $%d)", name, value)
	}
	return where
}

// conditions are what rows have to meet, and the values of their placeholders.
type conditions struct {
	where []string
	args  []any
}

// add adds a condition whose placeholders are written $%d.
func (c *conditions) add(format string, values ...any) {
	c.where = append(c.where, c.place(format, values...))
}

// addIn adds the condition that a column has one of the values.
func addIn[T any](c *conditions, column string, values []T) {
	list := make([]any, len(values))
	for i, v := range values {
		list[i] = v
	}
	c.add(column+" IN ($%d"+strings.Repeat(", $%d", len(list)-1)+")", list...)
}

func (c *conditions) place(format string, values ...any) string {
	places := make([]any, len(values))
	for i, v := range values {
		c.args = append(c.args, v)
		places[i] = len(c.args)
	}
	return fmt.Sprintf(format, places...)
}

func (c *conditions) clause() string {
	if len(c.where) == 0 {
		return ""
	}
	return " WHERE " + strings.Join(c.where, " AND ")
}

// limit is the end of a query for at most n rows, 0 for all.
func (c *conditions) limit(n int) string {
	if n == 0 {
		return ""
	}
	return c.place(" LIMIT $%d", n)
}
