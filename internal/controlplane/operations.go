package controlplane

import (
	"context"
	"sync"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// operations are what this process is doing to sandboxes right now, so that a
// second caller waits for the first, and the reconciler leaves alone what is in
// good hands.
type operations struct {
	mu       sync.Mutex
	creating map[sandbox.ID]*creation
	ending   map[sandbox.ID]*ending
}

// creation is a create between its record and its outcome.
type creation struct {
	cancel context.CancelFunc
	done   chan struct{}
}

// ending is the teardown of a sandbox; what follows done is valid once that is
// closed.
type ending struct {
	done    chan struct{}
	claimed bool // the sandbox was recorded as ending: it is not to be ended again
	err     error
}

// beginCreate registers a creation; finish is to be called when the agent's
// part of it is over, and may be called twice.
func (o *operations) beginCreate(id sandbox.ID, cancel context.CancelFunc) (finish func()) {
	cr := &creation{cancel: cancel, done: make(chan struct{})}
	o.mu.Lock()
	o.creating[id] = cr
	o.mu.Unlock()
	return sync.OnceFunc(func() {
		o.mu.Lock()
		delete(o.creating, id)
		o.mu.Unlock()
		close(cr.done)
	})
}

// creation returns the create of that id that is in progress, or nil.
func (o *operations) creation(id sandbox.ID) *creation {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.creating[id]
}

// beginEnd registers a teardown, or returns the one in progress and false.
func (o *operations) beginEnd(id sandbox.ID) (*ending, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if e := o.ending[id]; e != nil {
		return e, false
	}
	e := &ending{done: make(chan struct{})}
	o.ending[id] = e
	return e, true
}

func (o *operations) finishEnd(id sandbox.ID, e *ending, claimed bool, err error) {
	o.mu.Lock()
	delete(o.ending, id)
	o.mu.Unlock()
	e.claimed, e.err = claimed, err
	close(e.done)
}

// busy reports whether a create or a teardown of that id is in progress.
func (o *operations) busy(id sandbox.ID) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.creating[id] != nil || o.ending[id] != nil
}
