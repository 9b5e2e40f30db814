package sandbox

import "time"

// Event is one step in a sandbox's life: that it was created, or went from one
// state to another. Events outlive the sandbox and its record.
type Event struct {
	Seq       int64 // grows from one to the next, over all sandboxes
	SandboxID ID
	TeamID    string
	Time      time.Time
	From      State // empty: it was created
	State     State
	Cause     string        // in words; shown to users
	Duration  time.Duration // how long it was in From
}
