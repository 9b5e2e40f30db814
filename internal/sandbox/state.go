package sandbox

import "slices"

// State is where a sandbox is in its life.
type State string

// The states, in the order of a life.
const (
	Pending  State = "pending"  // intent recorded, nothing made yet
	Starting State = "starting" // the host agent is making it
	Running  State = "running"
	Pausing  State = "pausing"
	Paused   State = "paused"
	Resuming State = "resuming"
	Stopping State = "stopping" // being torn down
	Stopped  State = "stopped"  // ended as asked: killed or expired
	Failed   State = "error"    // ended by itself; Reason says why
)

// transitions are the legal moves. Every state but the two final ones can go to
// Stopping (deletion works from everywhere) and to Failed.
var transitions = map[State][]State{
	Pending:  {Starting},
	Starting: {Running},
	Running:  {Pausing},
	Pausing:  {Paused, Running}, // back to Running when the pause failed and was undone
	Paused:   {Resuming},
	Resuming: {Running, Paused},
	Stopping: {Stopped},
	Stopped:  nil,
	Failed:   nil,
}

// Final reports whether s is an end: nothing of the sandbox is left but its record.
func (s State) Final() bool { return s == Stopped || s == Failed }

// Valid reports whether s is a state at all.
func (s State) Valid() bool { _, ok := transitions[s]; return ok }

// CanBecome reports whether a sandbox in state s may go to state t.
func (s State) CanBecome(t State) bool {
	if s.Final() || !s.Valid() {
		return false
	}
	if (t == Stopping && s != Stopping) || t == Failed {
		return true
	}
	return slices.Contains(transitions[s], t)
}
