package controlplane

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

// DefaultTeam is the id and slug of the team that a platform of one user has.
const DefaultTeam = "default"

// Bootstrap makes sure that the default team is there and, unless apiKey is
// empty, that this key acts for it.
func (c *ControlPlane) Bootstrap(ctx context.Context, apiKey string) (store.Team, error) {
	team := store.Team{ID: DefaultTeam, Slug: DefaultTeam, Name: "Default", Created: time.Now()}
	err := c.cfg.Store.Teams().Insert(ctx, team)
	if errors.Is(err, sandbox.ErrConflict) {
		team, err = c.cfg.Store.Teams().Get(ctx, DefaultTeam)
	}
	if err != nil {
		return store.Team{}, fmt.Errorf("make default team: %w", err)
	}
	if apiKey == "" {
		return team, nil
	}
	hash := sha256.Sum256([]byte(apiKey))
	err = c.cfg.Store.APIKeys().Insert(ctx, store.APIKey{
		ID: hex.EncodeToString(hash[:8]), TeamID: team.ID, Name: "local operator", Hash: hash, Created: time.Now(),
	})
	if err != nil && !errors.Is(err, sandbox.ErrConflict) {
		return store.Team{}, fmt.Errorf("register API key: %w", err)
	}
	return team, nil
}

// keyLife is how long a deleted key may still work.
const keyLife = 10 * time.Second

// keyCache saves the store two queries per request. It has valid keys only, so
// guessing does not fill it.
type keyCache struct {
	mu      sync.Mutex
	entries map[[32]byte]cachedKey
}

type cachedKey struct {
	team    store.Team
	expires time.Time
}

// Authenticate returns the team that an API key acts for, or
// sandbox.ErrUnauthenticated.
func (c *ControlPlane) Authenticate(ctx context.Context, apiKey string) (store.Team, error) {
	if apiKey == "" {
		return store.Team{}, sandbox.Errorf(sandbox.ErrUnauthenticated, "API key is missing: send it in the X-API-Key header")
	}
	hash := sha256.Sum256([]byte(apiKey))
	c.keys.mu.Lock()
	cached, found := c.keys.entries[hash]
	c.keys.mu.Unlock()
	if found && time.Now().Before(cached.expires) {
		return cached.team, nil
	}
	key, err := c.cfg.Store.APIKeys().GetByHash(ctx, hash)
	if errors.Is(err, sandbox.ErrNotFound) || (err == nil && subtle.ConstantTimeCompare(key.Hash[:], hash[:]) != 1) {
		c.keys.mu.Lock()
		delete(c.keys.entries, hash)
		c.keys.mu.Unlock()
		return store.Team{}, sandbox.Errorf(sandbox.ErrUnauthenticated, "API key is not valid")
	}
	if err != nil {
		return store.Team{}, fmt.Errorf("look up API key: %w", err)
	}
	team, err := c.cfg.Store.Teams().Get(ctx, key.TeamID)
	if err != nil {
		return store.Team{}, fmt.Errorf("look up team of API key: %w", err)
	}
	c.keys.mu.Lock()
	c.keys.entries[hash] = cachedKey{team, time.Now().Add(keyLife)}
	c.keys.mu.Unlock()
	return team, nil
}

// PutTemplate makes a template available, or a new build of it. An empty TeamID
// means the default team.
func (c *ControlPlane) PutTemplate(ctx context.Context, t store.Template) error {
	if t.TeamID == "" {
		t.TeamID = DefaultTeam
	}
	now := time.Now()
	if t.Created.IsZero() {
		t.Created = now
	}
	if t.Updated.IsZero() {
		t.Updated = now
	}
	if err := c.cfg.Store.Templates().Put(ctx, t); err != nil {
		return fmt.Errorf("register template %s: %w", t.Alias, err)
	}
	return nil
}

// Template finds a template that the team may use, by id or by
// "[team slug/]alias[:default]".
func (c *ControlPlane) Template(ctx context.Context, teamID, ref string) (store.Template, error) {
	notFound := sandbox.Errorf(sandbox.ErrNotFound, "template %q not found", clip(ref))
	name, tag, tagged := strings.Cut(ref, ":")
	if name == "" || (tagged && tag != "default") {
		return store.Template{}, notFound
	}
	slug, alias, namespaced := strings.Cut(name, "/")
	var t store.Template
	var err error
	if namespaced {
		t, err = c.cfg.Store.Templates().GetByAlias(ctx, alias)
		if err == nil {
			var team store.Team
			if team, err = c.cfg.Store.Teams().Get(ctx, t.TeamID); err == nil && team.Slug != slug {
				err = sandbox.ErrNotFound
			}
		}
	} else {
		t, err = c.cfg.Store.Templates().GetByAlias(ctx, name)
		if errors.Is(err, sandbox.ErrNotFound) {
			t, err = c.cfg.Store.Templates().Get(ctx, name)
		}
	}
	switch {
	case errors.Is(err, sandbox.ErrNotFound):
		return store.Template{}, notFound
	case err != nil:
		return store.Template{}, fmt.Errorf("look up template: %w", err)
	case !t.Public && t.TeamID != teamID:
		return store.Template{}, sandbox.Errorf(sandbox.ErrForbidden, "template %q is not yours", clip(ref))
	}
	return t, nil
}

// Templates returns the templates that the team may use.
func (c *ControlPlane) Templates(ctx context.Context, teamID string) ([]store.Template, error) {
	return c.cfg.Store.Templates().ListVisible(ctx, teamID)
}

func clip(s string) string {
	if len(s) > 64 {
		return s[:64] + "…"
	}
	return s
}
