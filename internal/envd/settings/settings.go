// Package settings holds what the host tells the guest agent about the sandbox
// it runs in: the default user and working directory and the environment that
// every process gets. It starts empty and is filled by /init.
package settings

import (
	"maps"
	"os"
	"path/filepath"
	"sync"
)

// RootUser is the default user until the host has named one.
const RootUser = "root"

// RunDir is where programs in the sandbox find who they are.
const RunDir = "/run/e2b"

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
// variables under both Wrenn's and E2B's names. An empty id leaves what was set.
func (s *Settings) SetIdentity(sandboxID, templateID string) {
	s.mu.Lock()
	id := maps.Clone(s.identity)
	if id == nil {
		id = make(map[string]string)
	}
	id["E2B_SANDBOX"] = "true"
	if sandboxID != "" {
		id["E2B_SANDBOX_ID"], id["WRENN_SANDBOX_ID"] = sandboxID, sandboxID
	}
	if templateID != "" {
		id["E2B_TEMPLATE_ID"], id["WRENN_TEMPLATE_ID"] = templateID, templateID
	}
	s.identity = id
	s.mu.Unlock()
}

// WriteIdentity writes the same to files in dir, for programs that look there.
func (s *Settings) WriteIdentity(dir string) error {
	s.mu.RLock()
	id := s.identity // replaced as a whole, never changed
	s.mu.RUnlock()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"E2B_SANDBOX", "E2B_SANDBOX_ID", "E2B_TEMPLATE_ID"} {
		value, ok := id[name]
		if !ok {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, "."+name), []byte(value), 0o644); err != nil {
			return err
		}
	}
	return nil
}
