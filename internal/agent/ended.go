package agent

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

func (a *Agent) endedDir() string { return filepath.Join(a.cfg.Dir, "ended") }

func endedFile(dir string, id sandbox.ID) string { return filepath.Join(dir, string(id)+".json") }

// journalEnd keeps the reason of an end that nobody asked for: the control plane
// has to learn it also from the agent that follows this one.
func (a *Agent) journalEnd(ob obituary) {
	if ob.State != sandbox.Failed {
		return
	}
	data, err := json.Marshal(ob)
	if err == nil {
		tmp := filepath.Join(a.endedDir(), "."+string(ob.ID))
		if err = os.WriteFile(tmp, data, 0o600); err == nil {
			err = os.Rename(tmp, endedFile(a.endedDir(), ob.ID))
		}
	}
	if err != nil {
		a.log.Warn("journal end of sandbox", "sandbox", ob.ID, "err", err) // it costs the reason, and only after a kill
	}
}

// load reads what an earlier agent has journaled, and forgets what is old.
func (o *obituaries) load(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("read ends of sandboxes: %w", err)
	}
	var found []obituary
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		var ob obituary
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("read ends of sandboxes: %w", err)
		}
		name, whole := strings.CutSuffix(e.Name(), ".json")
		if !whole || json.Unmarshal(data, &ob) != nil || string(ob.ID) != name || time.Since(ob.Time) > obituaryAge {
			if err := os.Remove(path); err != nil {
				return fmt.Errorf("forget end of sandbox: %w", err)
			}
			continue
		}
		found = append(found, ob)
	}
	slices.SortFunc(found, func(x, y obituary) int { return x.Time.Compare(y.Time) })
	o.mu.Lock()
	o.dir = dir
	o.mu.Unlock()
	for _, ob := range found {
		o.add(ob, false)
	}
	return nil
}
