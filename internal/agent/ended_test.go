package agent

import (
	"log/slog"
	"os"
	"testing"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestTheReasonOfAnEndOutlivesTheAgent(t *testing.T) {
	dir := t.TempDir()
	a := &Agent{cfg: Config{Dir: dir}, log: slog.New(slog.DiscardHandler)}
	if err := os.Mkdir(a.endedDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	died := obituary{ID: sandbox.NewID(), State: sandbox.Failed, Reason: "sandbox engine was killed (signal 9)", Time: now}
	old := obituary{ID: sandbox.NewID(), State: sandbox.Failed, Reason: "long ago", Time: now.Add(-2 * obituaryAge)}
	asked := obituary{ID: sandbox.NewID(), State: sandbox.Stopped, Reason: "it was killed", Time: now}
	for _, ob := range []obituary{died, old, asked} {
		a.journalEnd(ob)
	}
	// As a kill in the middle of a write leaves it.
	if err := os.WriteFile(endedFile(a.endedDir(), sandbox.NewID()), []byte(`{"id`), 0o600); err != nil {
		t.Fatal(err)
	}

	next := newObituaries()
	if err := next.load(a.endedDir()); err != nil {
		t.Fatal(err)
	}
	got := next.list()
	if len(got) != 1 || got[0].ID != died.ID || got[0].Reason != died.Reason || !got[0].Time.Equal(now) {
		t.Errorf("the next agent knows %+v, want the one that died", got)
	}
	entries, err := os.ReadDir(a.endedDir())
	if err != nil || len(entries) != 1 {
		t.Errorf("left in the journal: %v, %v", entries, err)
	}
}
