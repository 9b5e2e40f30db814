package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/wrenn/wrenn/internal/sandbox"
)

// record is the journal entry of one sandbox: what the agent must know to take
// it over or to free all it holds after being killed at any instruction. It is
// written before each act and after its outcome. The access token is not in it;
// the control plane gives it again.
type record struct {
	ID             sandbox.ID        `json:"id"`
	State          sandbox.State     `json:"state"`
	TemplateID     string            `json:"template_id"`
	BuildID        string            `json:"build_id"`
	Resources      sandbox.Resources `json:"resources"`
	DefaultUser    string            `json:"default_user,omitempty"`
	DefaultWorkdir string            `json:"default_workdir,omitempty"`
	AllowInternet  bool              `json:"allow_internet"`
	GuestInit      string            `json:"guest_init"` // file name of the guest agent's binary in it
	Runtime        string            `json:"runtime"`
	EnvdVersion    string            `json:"envd_version,omitempty"`
	Created        time.Time         `json:"created"`
	Changed        time.Time         `json:"changed"`

	// How a sandbox ends that is Stopping.
	End    sandbox.State `json:"end,omitempty"`
	Reason string        `json:"reason,omitempty"`

	// Of the instance that it runs in.
	Instance     sandbox.ID      `json:"instance,omitempty"`
	Slot         int             `json:"slot"`
	RuntimeState json.RawMessage `json:"runtime_state,omitempty"`

	ImageBytes int64 `json:"image_bytes,omitempty"` // of a paused one
}

const recordFile = "record.json"

// save replaces the record in dir. It is durable against the death of this
// process, and that of a paused sandbox also against the death of the host, which
// nothing else survives: a record torn by that is treated as one of a sandbox that
// never got to run.
func (r record) save(dir string) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record of %s: %w", r.ID, err)
	}
	tmp := filepath.Join(dir, "."+recordFile)
	if err := os.WriteFile(tmp, data, 0o600); err != nil {
		return fmt.Errorf("write record of %s: %w", r.ID, err)
	}
	if r.State == sandbox.Paused {
		if err := syncPath(tmp); err != nil {
			return fmt.Errorf("write record of %s: %w", r.ID, err)
		}
	}
	if err := os.Rename(tmp, filepath.Join(dir, recordFile)); err != nil {
		return fmt.Errorf("write record of %s: %w", r.ID, err)
	}
	if r.State == sandbox.Paused {
		if err := errors.Join(syncPath(dir), syncPath(filepath.Dir(dir))); err != nil {
			return fmt.Errorf("write record of %s: %w", r.ID, err)
		}
	}
	return nil
}

// loadRecords reads the journal in dir, one directory a sandbox. A directory
// without a readable record gives one with only its id and the state Starting.
// Names that are not sandbox ids are left alone.
func loadRecords(dir string) ([]record, error) {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read journal: %w", err)
	}
	var records []record
	for _, e := range entries {
		id, err := sandbox.ParseID(e.Name())
		if err != nil {
			continue
		}
		r := record{ID: id, State: sandbox.Starting}
		if data, err := os.ReadFile(filepath.Join(dir, e.Name(), recordFile)); err == nil {
			if err := json.Unmarshal(data, &r); err != nil || r.ID != id {
				r = record{ID: id, State: sandbox.Starting}
			}
		}
		records = append(records, r)
	}
	return records, nil
}

// Runtimes are those of the sandboxes and snapshots that an agent keeps in dir, by
// name: an agent of another runtime would take them for lost. Live are those of
// sandboxes that are not paused: only an agent of their own can take them over.
func Runtimes(dir string) (all, live []string, err error) {
	records, err := loadRecords(filepath.Join(dir, "sandboxes"))
	if err != nil {
		return nil, nil, err
	}
	found, runs := map[string]bool{}, map[string]bool{}
	for _, r := range records {
		found[r.Runtime] = true
		runs[r.Runtime] = runs[r.Runtime] || r.State != sandbox.Paused
	}
	maps.DeleteFunc(runs, func(_ string, is bool) bool { return !is })
	manifests, err := filepath.Glob(filepath.Join(dir, "images", "*", manifestFile))
	if err != nil {
		return nil, nil, err
	}
	for _, path := range manifests {
		var m manifest
		if data, err := os.ReadFile(path); err == nil && json.Unmarshal(data, &m) == nil {
			found[m.Runtime] = true
		}
	}
	delete(found, "") // of what was only begun, or is damaged
	delete(runs, "")
	return slices.Sorted(maps.Keys(found)), slices.Sorted(maps.Keys(runs)), nil
}
