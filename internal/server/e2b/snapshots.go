package e2b

import (
	"errors"
	"net/http"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// snapshotResponse is a snapshot, to E2B's clients a template that they know by an
// id and names. The rest is ours.
type snapshotResponse struct {
	SnapshotID string    `json:"snapshotID"`
	Names      []string  `json:"names"`
	SandboxID  string    `json:"sandboxID"`
	TemplateID string    `json:"templateID"`
	Alias      string    `json:"alias,omitempty"`
	Kind       string    `json:"kind"` // memory or files
	SizeBytes  int64     `json:"sizeBytes"`
	CreatedAt  time.Time `json:"createdAt"`
}

// asTag is what E2B's clients expect at the end of an id or name without a tag.
const asTag = ":default"

// snapshotOf describes a snapshot. Its id is always its own, also where it has a
// name: of two with one name each can be used and deleted by its id.
func snapshotOf(n store.Snapshot, team store.Team) snapshotResponse {
	names := []string{}
	if n.Name != "" {
		name := team.Slug + "/" + n.Name
		if !strings.Contains(n.Name, ":") {
			name += asTag
		}
		names = append(names, name)
	}
	return snapshotResponse{
		SnapshotID: n.ID + asTag, Names: names, SandboxID: string(n.SandboxID), TemplateID: n.TemplateID, Alias: n.Alias,
		Kind: string(n.Kind), SizeBytes: n.SizeBytes, CreatedAt: timestamp(n.Created),
	}
}

func (a *api) snapshot(c *call) error {
	id, err := c.sandboxID()
	if err != nil {
		return err
	}
	var body struct {
		Name string `json:"name"`
	}
	if _, err := decode(c.r, &body); err != nil {
		return err
	}
	n, err := a.plane.Snapshot(c.r.Context(), c.team.ID, id, body.Name)
	if err != nil {
		return err
	}
	return writeJSON(c.w, http.StatusCreated, snapshotOf(n, c.team))
}

func (a *api) listSnapshots(c *call) error {
	query, err := c.query()
	if err != nil {
		return err
	}
	limit, err := c.integer("limit", maxPage, 1, maxPage)
	if err != nil {
		return err
	}
	f := store.SnapshotFilter{States: []store.SnapshotState{store.SnapshotReady}, Limit: int(limit) + 1} // one more tells whether there is a next page
	if token := query.Get("nextToken"); token != "" {
		cursor, err := parseToken(token)
		if err != nil {
			return err
		}
		f.After = &store.SnapshotCursor{Created: cursor.Started, ID: string(cursor.ID)}
	}
	possible := true // that there is anything of that name and of that sandbox
	if text := query.Get("sandboxID"); text != "" {
		plain, _, _ := strings.Cut(text, "-")
		f.SandboxID, err = sandbox.ParseID(plain)
		possible = err == nil
	}
	if text := query.Get("name"); text != "" {
		team, name, err := sandbox.ParseName(text)
		f.Ref, possible = name, possible && err == nil && (team == "" || team == c.team.Slug)
	}
	var snapshots []store.Snapshot
	if possible {
		if snapshots, err = a.plane.Snapshots(c.r.Context(), c.team.ID, f); err != nil {
			return err
		}
	}
	if len(snapshots) > int(limit) {
		snapshots = snapshots[:limit]
		last := snapshots[limit-1]
		c.w.Header().Set("X-Next-Token", formatToken(store.Cursor{Started: last.Created, ID: sandbox.ID(last.ID)}))
	}
	list := make([]snapshotResponse, 0, len(snapshots))
	for _, n := range snapshots {
		list = append(list, snapshotOf(n, c.team))
	}
	return writeJSON(c.w, http.StatusOK, list)
}

// deleteTemplate deletes a snapshot, which E2B's clients take for a template.
func (a *api) deleteTemplate(c *call) error {
	ref := c.params["templateID"]
	err := a.plane.DeleteSnapshot(c.r.Context(), c.team.ID, ref)
	if err == nil {
		return noContent(c.w)
	}
	if errors.Is(err, sandbox.ErrNotFound) {
		switch _, terr := a.plane.Template(c.r.Context(), c.team.ID, ref); {
		case terr == nil:
			return notServed("deleting templates other than snapshots")
		case !errors.Is(terr, sandbox.ErrNotFound):
			return terr
		}
	}
	return err
}
