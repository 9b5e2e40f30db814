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
	mu     sync.Mutex
	moving map[sandbox.ID]*move
	ending map[sandbox.ID]*ending
	images map[string]int // images on hosts that no record names yet, or any more, by users
}

func newOperations() operations {
	return operations{moving: make(map[sandbox.ID]*move), ending: make(map[sandbox.ID]*ending), images: make(map[string]int)}
}

// move is a create, a pause or a resume between its record and its outcome.
type move struct {
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

// beginMove registers a move, unless there is one in progress: then that is
// returned and finish is nil. finish is to be called when the agent's part of it is
// over, and may be called twice.
func (o *operations) beginMove(id sandbox.ID, cancel context.CancelFunc) (other *move, finish func()) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if mv := o.moving[id]; mv != nil {
		return mv, nil
	}
	mv := &move{cancel: cancel, done: make(chan struct{})}
	o.moving[id] = mv
	return nil, sync.OnceFunc(func() {
		o.mu.Lock()
		delete(o.moving, id)
		o.mu.Unlock()
		close(mv.done)
	})
}

// move returns the move of that id that is in progress, or nil.
func (o *operations) move(id sandbox.ID) *move {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.moving[id]
}

// settled waits until no move is in progress that was when it was called.
func (o *operations) settled(ctx context.Context) {
	o.mu.Lock()
	var all []*move
	for _, mv := range o.moving {
		all = append(all, mv)
	}
	o.mu.Unlock()
	for _, mv := range all {
		select {
		case <-mv.done:
		case <-ctx.Done():
			return
		}
	}
}

// useImage keeps an image that no record names from being taken for garbage, until
// the function that it returns is called.
func (o *operations) useImage(id string) (release func()) {
	o.mu.Lock()
	o.images[id]++
	o.mu.Unlock()
	return func() {
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.images[id]--; o.images[id] == 0 {
			delete(o.images, id)
		}
	}
}

func (o *operations) usesImage(id string) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.images[id] > 0
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

// busy reports whether a move or a teardown of that id is in progress.
func (o *operations) busy(id sandbox.ID) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.moving[id] != nil || o.ending[id] != nil
}
