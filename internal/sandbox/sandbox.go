// Package sandbox is the domain: what a sandbox is, the states it goes through,
// the errors that everything about it can return. It does no I/O and imports
// nothing else of this project.
package sandbox

import "time"

// Resources are a sandbox's limits. All are enforced by the host.
type Resources struct {
	CPUs      int   // virtual CPUs
	MemoryMiB int64 // guest memory; going beyond ends the sandbox
	DiskMiB   int64 // writable space on the root filesystem
	PIDs      int64 // host tasks the sandbox may hold, guest and sandbox kernel together
}

// Spec is what the creator of a sandbox asked for.
type Spec struct {
	TemplateID          string
	BuildID             string // the template build it starts from
	SnapshotID          string // the snapshot it was started from; empty: the template itself
	Resources           Resources
	EnvVars             map[string]string // global environment of its processes
	Metadata            map[string]string // the owner's labels, opaque to us
	Secured             bool              // envd wants an access token
	AllowInternetAccess bool
	Timeout             time.Duration // time to live from start
	Protected           bool          // ports other than envd's want the traffic token or a preview link
	MaskRequestHost     string        // Host that its applications see, see CheckMaskRequestHost; empty: the client's
	AutoPause           bool          // at the end of its time to live it is paused, not killed
	AutoPauseMemory     bool          // that pause keeps its memory
	AutoResume          bool          // traffic wakes it when it is paused
}

// Sandbox is the control plane's record of one sandbox.
type Sandbox struct {
	ID          ID
	TeamID      string
	HostID      string
	SourceID    ID // the sandbox it was forked from; empty: none
	Spec        Spec
	State       State
	MemoryKept  bool      // while Paused: its memory is kept, not only its files
	ImageBytes  int64     // while Paused: what its image takes on its host's disk
	Reason      string    // why it is Stopped or Failed; shown to users
	Address     string    // IP address at which the host agent reaches the guest; empty until Running
	EnvdVersion string    // version of the guest agent in it; empty until Running
	Alias       string    // template alias it was asked by; may be empty
	Created     time.Time // intent recorded
	Changed     time.Time // when it got into its State
	Started     time.Time // zero until Running
	Ends        time.Time // when its time to live is over
	Ended       time.Time // zero until final
}
