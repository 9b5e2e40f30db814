// Package life has what is the same in the instances of every runtime, from start to
// end: whose id is taken, the control group /wrenn-<tag>/<id>, the process that is the
// instance's engine, its figures, and that it is freed once.
package life

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/wrenn/wrenn/internal/cgroup"
	"github.com/wrenn/wrenn/internal/sandbox"
)

// FreeTime bounds a clean-up: processes end in milliseconds, so this is only reached
// when the host is in deep trouble.
const FreeTime = 30 * time.Second

// Set is the instances of one platform on this host, whichever runtime's, and what one
// runtime does for its own in this process.
type Set struct {
	Cgroups cgroup.Trees
	parent  string // their common group

	ctx  context.Context // ends with Close
	stop context.CancelFunc
	work sync.WaitGroup // watchers and clean-ups

	mu      sync.Mutex
	claimed map[sandbox.ID]bool // ids being created just now
}

// OpenSet finds the control groups of the platform with this tag. It makes nothing.
func OpenSet(tag string) (*Set, error) {
	cgroups, err := cgroup.Find()
	if err != nil {
		return nil, err
	}
	ctx, stop := context.WithCancel(context.Background())
	return &Set{Cgroups: cgroups, parent: "/wrenn-" + tag, ctx: ctx, stop: stop, claimed: map[sandbox.ID]bool{}}, nil
}

// Close ends what this process does for instances, and waits for it. They go on.
func (s *Set) Close() {
	s.stop()
	s.work.Wait()
}

// Context ends with Close.
func (s *Set) Context() context.Context { return s.ctx }

// Go runs f, which Close waits for.
func (s *Set) Go(f func()) { s.work.Go(f) }

// Group is the control group of an instance.
func (s *Set) Group(id sandbox.ID) string { return filepath.Join(s.parent, string(id)) }

// IDs are those of the instances that have a control group, running or not.
func (s *Set) IDs() []string { return s.Cgroups.Children(s.parent) }

// Claim takes the id for a creation, until Release.
func (s *Set) Claim(id sandbox.ID) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.claimed[id] || s.Cgroups.Exists(s.Group(id)) {
		return InUse(id)
	}
	s.claimed[id] = true
	return nil
}

// Release ends what Claim began.
func (s *Set) Release(id sandbox.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.claimed, id)
}

// EndGroup ends every process of an instance and removes its control group, as far as
// they are there.
func (s *Set) EndGroup(ctx context.Context, id sandbox.ID) error {
	if err := s.Cgroups.Kill(ctx, s.Group(id)); err != nil {
		return err
	}
	return s.Cgroups.Remove(ctx, s.Group(id))
}

// RemoveParent removes the group that those of the instances are in, which have gone.
func (s *Set) RemoveParent() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	return s.Cgroups.Remove(ctx, s.parent)
}

// FreeAll calls free for all these instances, several at once.
func FreeAll(ids []string, free func(context.Context, sandbox.ID) error) error {
	var g errgroup.Group
	g.SetLimit(8)
	for _, id := range ids {
		g.Go(func() error {
			ctx, cancel := context.WithTimeout(context.Background(), FreeTime)
			defer cancel()
			return free(ctx, sandbox.ID(id))
		})
	}
	return g.Wait()
}

// InUse is the error of a creation with an id that is taken.
func InUse(id sandbox.ID) error {
	return sandbox.Errorf(sandbox.ErrConflict, "sandbox %s exists already", id)
}
