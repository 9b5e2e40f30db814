// Package store is the control plane's state: teams, API keys, templates and
// sandboxes' records. It is an interface; package sqlite is behind it for one
// host, and package storetest is the suite every implementation passes.
//
// Errors that callers tell apart are the kinds of package sandbox: ErrNotFound
// when there is no such record, ErrConflict when it is not in the state that the
// change needs or its name is taken. Every write that returned without an error
// survives a kill of the process.
package store

import (
	"context"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// Store is all state of the control plane. It is safe for concurrent use.
type Store interface {
	Teams() Teams
	APIKeys() APIKeys
	Templates() Templates
	Sandboxes() Sandboxes
	Close() error
}

// A Team owns sandboxes, templates and API keys.
type Team struct {
	ID      string
	Slug    string // unique; [a-z0-9-]
	Name    string
	Created time.Time
}

// Teams are the accounts.
type Teams interface {
	// Insert adds a team. ErrConflict: id or slug taken.
	Insert(ctx context.Context, t Team) error
	Get(ctx context.Context, id string) (Team, error)
	GetBySlug(ctx context.Context, slug string) (Team, error)
}

// An APIKey lets its holder act for a team. The key itself is not kept, only
// its SHA-256.
type APIKey struct {
	ID      string
	TeamID  string
	Name    string
	Hash    [32]byte // SHA-256 of the key
	Created time.Time
}

// APIKeys are looked up by their hash.
type APIKeys interface {
	// Insert adds a key. ErrConflict: the key or its id is there already.
	Insert(ctx context.Context, k APIKey) error
	GetByHash(ctx context.Context, hash [32]byte) (APIKey, error)
	List(ctx context.Context, teamID string) ([]APIKey, error)
	// Delete removes a team's key. ErrNotFound: no such key in that team.
	Delete(ctx context.Context, teamID, id string) error
}

// A Template is what sandboxes start from; BuildID names its newest usable build.
type Template struct {
	ID          string
	Alias       string // name that people use; unique
	TeamID      string // owner
	Public      bool   // any team may use it
	BuildID     string
	CPUs        int
	MemoryMiB   int64
	DiskMiB     int64
	User        string            // default user of processes
	Workdir     string            // default working directory
	EnvVars     map[string]string // environment of every process, before the creator's
	EnvdVersion string
	Created     time.Time
	Updated     time.Time
}

// Templates are the templates that sandboxes can be made from.
type Templates interface {
	// Put adds the template or replaces the one with the same id; then Created
	// stays as it was. ErrConflict: the alias belongs to another one.
	Put(ctx context.Context, t Template) error
	Get(ctx context.Context, id string) (Template, error)
	GetByAlias(ctx context.Context, alias string) (Template, error)
	// ListVisible returns the team's templates and the public ones, oldest first.
	ListVisible(ctx context.Context, teamID string) ([]Template, error)
}

// Sandboxes are the records of sandboxes. Spec.EnvVars is not kept: the
// environment often holds secrets, and only the sandbox itself needs it.
type Sandboxes interface {
	// Insert adds a record. ErrConflict: the id is taken.
	Insert(ctx context.Context, s sandbox.Sandbox) error
	Get(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error)

	// Transition moves a record from one state to another, atomically.
	// ErrConflict: it is not (any more) in that state, or Change.IfEndsBy does
	// not hold; ErrNotFound: no such record.
	Transition(ctx context.Context, id sandbox.ID, from sandbox.State, c Change) error

	// SetEnds sets when the time to live of a running sandbox is over.
	// ErrConflict: it is not running; ErrNotFound: no such record.
	SetEnds(ctx context.Context, id sandbox.ID, ends time.Time) error

	// ExtendEnds is SetEnds that only ever moves the end later; it returns the
	// end that holds now.
	ExtendEnds(ctx context.Context, id sandbox.ID, ends time.Time) (time.Time, error)

	List(ctx context.Context, f Filter) ([]sandbox.Sandbox, error)
	Count(ctx context.Context, f Filter) (int, error)

	// NextEnd returns the earliest end among running sandboxes of a host; false
	// when none runs.
	NextEnd(ctx context.Context, hostID string) (time.Time, bool, error)

	// Purge deletes records of sandboxes that ended before t and returns how many.
	Purge(ctx context.Context, t time.Time) (int64, error)
}

// Change is what a transition writes. Fields left at their zero value stay as
// they are.
type Change struct {
	State       sandbox.State
	Reason      string
	Address     string
	EnvdVersion string
	Started     time.Time
	Ends        time.Time
	Ended       time.Time

	// IfEndsBy, when set, makes the change only if the sandbox's time to live is
	// over by then: an expiry loses against an extension that came first.
	IfEndsBy time.Time
}

// Filter picks sandboxes. Zero fields do not filter. Results are ordered by
// start (by id where equal), newest first unless Ascending.
type Filter struct {
	TeamID       string
	HostID       string
	States       []sandbox.State
	Metadata     map[string]string // every one of these must be there
	Template     string            // template id or the alias the sandbox was asked by
	StartedAfter time.Time         // started at or after
	EndsBy       time.Time         // its time to live is over by then
	Ascending    bool
	After        *Cursor // only what comes after this one, in the order asked for
	Limit        int     // 0: all
}

// Cursor is a place in a list.
type Cursor struct {
	Started time.Time
	ID      sandbox.ID
}
