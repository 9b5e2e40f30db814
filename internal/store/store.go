// Package store is the control plane's state: teams, API keys, templates,
// sandboxes' records, what happened to them, and snapshots. It is an interface; package sqlite is behind it for one
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
	Events() Events
	Snapshots() Snapshots
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
	// Insert adds a record and, with it, the event that the sandbox was created.
	// Where Changed is zero it becomes Created. ErrConflict: the id is taken.
	Insert(ctx context.Context, s sandbox.Sandbox) error
	Get(ctx context.Context, id sandbox.ID) (sandbox.Sandbox, error)

	// Transition moves a record from one state to another and writes the event of
	// it, both or neither. ErrConflict: it is not (any more) in that state, or
	// Change.IfEndsBy does not hold; ErrNotFound: no such record.
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

	// ImageBytes returns what the images of the team's paused sandboxes take.
	ImageBytes(ctx context.Context, teamID string) (int64, error)

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
	MemoryKept  *bool
	AutoPause   *bool
	ImageBytes  *int64

	// Cause is the event's, in words. Empty: Reason; where that is empty too and
	// the sandbox is at its end, why it was being stopped.
	Cause string

	// At is when it happened. Zero: at Ended if that is set, else now. The store
	// takes no time before that of the sandbox's last event.
	At time.Time

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
	Template     string            // id of template or snapshot, or the alias the sandbox was asked by
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

// Events are what happened to sandboxes: sandboxes' inserts and transitions
// write them. They are kept when the sandbox's record is gone.
type Events interface {
	List(ctx context.Context, f EventFilter) ([]sandbox.Event, error)

	// Purge deletes events from before t and returns how many. It goes through
	// them in the order they were written and stops at one that is to be kept.
	Purge(ctx context.Context, t time.Time) (int64, error)
}

// EventFilter picks events. Zero fields do not filter. Results are in the order
// they were written, or backwards when Newest is set.
type EventFilter struct {
	TeamID    string
	SandboxID sandbox.ID
	After     int64 // only what has a greater Seq
	Before    int64 // only what has a smaller Seq
	Newest    bool
	Limit     int // 0: all
}

// A Snapshot is the image of a sandbox at one moment, from which others start.
type Snapshot struct {
	ID            string // also of the image on the host
	TeamID        string
	HostID        string
	Name          string     // what people call it; may be empty, and others may have it too
	SandboxID     sandbox.ID // whose image it is
	TemplateID    string     // that sandbox's template, its build and the alias it was asked by
	BuildID       string
	Alias         string
	Resources     sandbox.Resources
	Secured       bool // the guest agent in it wants an access token
	AllowInternet bool
	Kind          SnapshotKind
	User          string // default user of processes
	Workdir       string // default working directory
	EnvdVersion   string
	SizeBytes     int64
	State         SnapshotState
	Created       time.Time
}

// SnapshotKind is what an image holds.
type SnapshotKind string

// The kinds of snapshots.
const (
	SnapshotMemory SnapshotKind = "memory" // processes, memory and files
	SnapshotFiles  SnapshotKind = "files"
)

// SnapshotState is where a snapshot is in its life.
type SnapshotState string

// The states of a snapshot. Its record is deleted after its image.
const (
	SnapshotCreating SnapshotState = "creating"
	SnapshotReady    SnapshotState = "ready"
	SnapshotDeleting SnapshotState = "deleting"
)

// Snapshots are the records of snapshots.
type Snapshots interface {
	// Insert adds a snapshot. ErrConflict: the id is taken.
	Insert(ctx context.Context, s Snapshot) error
	Get(ctx context.Context, id string) (Snapshot, error)
	// GetByName returns the newest of the team's ready snapshots of that name.
	GetByName(ctx context.Context, teamID, name string) (Snapshot, error)
	// List returns the snapshots that the filter picks, newest first.
	List(ctx context.Context, f SnapshotFilter) ([]Snapshot, error)
	// SetState moves a snapshot from one state to another; a size of 0 stays as it
	// is. ErrConflict: it is not (any more) in that state.
	SetState(ctx context.Context, id string, from, to SnapshotState, sizeBytes int64) error
	// Delete removes a snapshot. ErrNotFound: it is not there.
	Delete(ctx context.Context, id string) error
	// TeamBytes returns how much the team's ready snapshots take.
	TeamBytes(ctx context.Context, teamID string) (int64, error)
}

// SnapshotFilter picks snapshots. Zero fields do not filter.
type SnapshotFilter struct {
	TeamID    string
	HostID    string
	SandboxID sandbox.ID
	Ref       string // its id or its name
	States    []SnapshotState
	After     *SnapshotCursor // only what comes after this one
	Limit     int             // 0: all
}

// SnapshotCursor is a place in a list of snapshots.
type SnapshotCursor struct {
	Created time.Time
	ID      string
}
