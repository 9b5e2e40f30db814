package sqlite

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
	"github.com/wrenn/wrenn/internal/store/storetest"
)

// BenchmarkLife is what the store has to do for a sandbox from its create to its
// end: one insert and three transitions.
func BenchmarkLife(b *testing.B) {
	s, err := Open(b.Context(), filepath.Join(b.TempDir(), "wrenn.db"))
	if err != nil {
		b.Fatal(err)
	}
	defer s.Close()
	if err := s.Teams().Insert(b.Context(), store.Team{ID: "t1", Slug: "t1"}); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		box := storetest.Sandbox(0)
		box.State = sandbox.Starting
		if err := s.Sandboxes().Insert(b.Context(), box); err != nil {
			b.Fatal(err)
		}
		for _, move := range []struct{ from, to sandbox.State }{
			{sandbox.Starting, sandbox.Running}, {sandbox.Running, sandbox.Stopping}, {sandbox.Stopping, sandbox.Stopped},
		} {
			c := store.Change{State: move.to, Reason: "it was killed", Ended: time.Now()}
			if err := s.Sandboxes().Transition(b.Context(), box.ID, move.from, c); err != nil {
				b.Fatal(err)
			}
		}
	}
}
