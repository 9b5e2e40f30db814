// Package runtime is the contract between the host agent and whatever isolates
// a sandbox. The agent asks for instances and never for which runtime makes
// them; package runtimetest is the suite that every implementation passes.
package runtime

import (
	"context"
	"encoding/json"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// A Runtime makes sandbox instances on this host. It is safe for concurrent use.
type Runtime interface {
	// Name is the runtime's name in records, metrics and the API: "gvisor".
	Name() string

	// Version identifies the engine, and what else new instances are made of.
	Version() string

	// Loads says whether an image of memory loads here that was made under this
	// version.
	Loads(version string) bool

	// Probe says by a functional test whether the runtime can run here. The
	// error says what is missing and what to do about it.
	Probe(ctx context.Context) error

	// Create starts an instance and returns once the guest's init runs; the
	// guest agent may not be listening yet. A failed Create leaves nothing: no
	// process, mount, cgroup or file. An id that is in use gives
	// sandbox.ErrConflict.
	Create(ctx context.Context, cfg Config) (Instance, error)

	// Restore starts an instance from an image that Snapshot has written, and
	// returns once the guest goes on from where it was: with ImageMemory its
	// processes, listeners and terminals are there and connections to outside are
	// not, at the latest once the guest agent has been told (/init): a guest with a
	// kernel of its own closes them then, and takes its Hostname; with ImageFiles its init starts anew on the files of the image. cfg is
	// that of the instance the image was taken of but for ID, Dir, Slot and
	// Hostname. An image of memory is taken as one of files where the runtime keeps
	// the files apart, whatever version it is of: as after a loss of power, without
	// what the guest had not handed to its disk. The image is only read, and may be restored from many times, also
	// at once. A failed Restore leaves nothing, as Create does. An image that is
	// damaged, or of another version of the engine, gives sandbox.ErrInvalid.
	Restore(ctx context.Context, cfg Config, image Image) (Instance, error)

	// Compress writes a smaller image of the same instance into dir, an empty
	// directory of the caller's, for a time in which nobody needs it: it takes longer
	// to restore from. image stays as it is; the two may share files. On an error
	// what was written is for the caller to remove. errors.ErrUnsupported says that
	// this runtime has no smaller form of such an image.
	Compress(ctx context.Context, image Image, dir string) error

	// Adopt finds the instance again that an earlier process of the agent
	// created, from what its State returned. sandbox.ErrNotFound means it is not
	// running any more, with the reason as its cause where that is known, and
	// sandbox.ErrInvalid that the state is not what State returned; then Discard
	// frees what is left of it.
	Adopt(ctx context.Context, id sandbox.ID, state json.RawMessage) (Instance, error)

	// Discard frees everything that an instance of this id may have left on the
	// host, running or not, also after a Create cut off at any point. It is
	// idempotent; state may be empty.
	Discard(ctx context.Context, id sandbox.ID, state json.RawMessage) error
}

// ImageKind says what of an instance an image holds.
type ImageKind string

// The kinds of images.
const (
	ImageMemory ImageKind = "memory" // memory, processes and files
	ImageFiles  ImageKind = "files"  // what its root filesystem has beyond the template's; the guest boots anew
)

// An Image is an instance on disk. What the files in Dir are is the runtime's
// affair; they are all in Dir itself, and whoever keeps the image keeps them
// whole.
type Image struct {
	Dir  string
	Kind ImageKind
}

// An Instance is one running sandbox. It survives the process that made it.
type Instance interface {
	// State is what Adopt needs to find the instance again. It does not change
	// over the instance's life.
	State() json.RawMessage

	// Done is closed when the instance has ended, for whatever reason.
	Done() <-chan struct{}

	// Exit says how it ended; valid once Done is closed.
	Exit() Exit

	// Snapshot writes an image of the instance into image.Dir, an empty directory
	// of the caller's. The instance goes on, with its connections; one call at a
	// time. When it returns without an error the files are whole, but not synced.
	// On an error the instance goes on all the same, and what was written is for
	// the caller to remove. A full disk is sandbox.ErrExhausted.
	//
	// Of files an image has what the guest has handed to its disk: the guest agent
	// is asked to first (/sync), and nothing else need be.
	//
	// With pause the guest does nothing any more after a Snapshot that returned
	// without an error: what it would do is not in the image. Stop is all that can
	// be called then, or Resume.
	Snapshot(ctx context.Context, image Image, pause bool) error

	// Resume lets an instance go on that Snapshot has paused, or that was being
	// paused when the agent was killed. On one that runs it does nothing.
	Resume(ctx context.Context) error

	// Identify says whose the instance is now, to a guest that asks the machine's
	// monitor. It may be called again, and must be after each Restore: what was said
	// of the instance of an image does not hold for others. The guest agent is told
	// by /init all the same, which does not wait for this; a runtime without such a
	// service does nothing.
	Identify(ctx context.Context, sandboxID, templateID string) error

	// Stop ends the instance by force and frees what the runtime holds for it.
	// It is idempotent and also right after the instance ended by itself. ctx
	// bounds the wait, not the clean-up that was begun.
	Stop(ctx context.Context) error

	// Stats measures what the instance takes from the host, sandbox kernel
	// included.
	Stats(ctx context.Context) (Stats, error)
}

// Exit is how an instance ended.
type Exit struct {
	OutOfMemory bool   // the memory limit was exceeded
	Reason      string // in words for the user, e.g. "out of memory: …"
}

// Stats are figures of the host's accounting.
type Stats struct {
	Time        time.Time
	CPU         time.Duration // used since the start
	MemoryBytes int64         // resident, reclaimable page cache left out
	PIDs        int64
}
