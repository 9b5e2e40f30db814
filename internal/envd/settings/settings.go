// Package settings holds what the host tells the guest agent about the sandbox
// it runs in: the default user and working directory and the environment that
// every process gets. It starts empty and is filled by /init.
package settings

import (
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
)

// RootUser is the default user until the host has named one.
const RootUser = "root"

// IDFile is where WriteIdentity writes the sandbox's id, below /run.
const IDFile = "/run/wrenn/.WRENN_SANDBOX_ID"

// Settings is safe for concurrent use. The zero value is ready.
type Settings struct {
	mu       sync.RWMutex
	user     string
	workdir  string
	env      map[string]string // set by the sandbox's creator
	identity map[string]string // set by the platform, wins over env
}

// User returns the name of the user that requests naming none act as.
func (s *Settings) User() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.user == "" {
		return RootUser
	}
	return s.user
}

// Workdir returns the directory that an empty path stands for, "" when it is
// the user's home.
func (s *Settings) Workdir() string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.workdir
}

// Env returns a copy of the global environment.
func (s *Settings) Env() map[string]string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	env := make(map[string]string, len(s.env)+len(s.identity))
	maps.Copy(env, s.env)
	maps.Copy(env, s.identity)
	return env
}

// SetDefaults changes the default user and working directory; an empty one
// stays as it is.
func (s *Settings) SetDefaults(user, workdir string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if user != "" {
		s.user = user
	}
	if workdir != "" {
		s.workdir = workdir
	}
}

// SetEnv replaces the creator's environment variables.
func (s *Settings) SetEnv(env map[string]string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.env = maps.Clone(env)
}

// SetIdentity tells processes which sandbox they are in, by environment
// variables under both Wrenn's and E2B's names. An empty id leaves what was set. It
// reports whether anything is another than before.
func (s *Settings) SetIdentity(sandboxID, templateID string) (changed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := s.cloneIdentity()
	id["E2B_SANDBOX"], id["WRENN_SANDBOX"] = "true", "true"
	if sandboxID != "" {
		id["E2B_SANDBOX_ID"], id["WRENN_SANDBOX_ID"] = sandboxID, sandboxID
	}
	if templateID != "" {
		id["E2B_TEMPLATE_ID"], id["WRENN_TEMPLATE_ID"] = templateID, templateID
	}
	changed = !maps.Equal(id, s.identity)
	s.identity = id
	return changed
}

// SetEvents tells processes where the host takes events.
func (s *Settings) SetEvents(addr netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	id := s.cloneIdentity()
	host := addr.String()
	if addr.Is6() {
		host = "[" + host + "]"
	}
	id["E2B_EVENTS_ADDRESS"] = "http://" + host
	s.identity = id
}

// cloneIdentity returns a copy: the map is replaced as a whole, never changed.
func (s *Settings) cloneIdentity() map[string]string {
	id := maps.Clone(s.identity)
	if id == nil {
		id = make(map[string]string)
	}
	return id
}

// WriteIdentity writes the same to files in directories of dir, for programs
// that look there: e2b/.E2B_SANDBOX_ID and so on, and the same for Wrenn.
func (s *Settings) WriteIdentity(dir string) error {
	s.mu.RLock()
	id := s.identity
	s.mu.RUnlock()
	for sub, prefix := range map[string]string{"e2b": "E2B_", "wrenn": "WRENN_"} {
		sub = filepath.Join(dir, sub)
		if err := os.MkdirAll(sub, 0o755); err != nil {
			return err
		}
		for _, name := range []string{"SANDBOX", "SANDBOX_ID", "TEMPLATE_ID"} {
			value, ok := id[prefix+name]
			if !ok {
				continue
			}
			if err := os.WriteFile(filepath.Join(sub, "."+prefix+name), []byte(value), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}
