package tlscert

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// systemStore is how a distribution is told of more authorities to trust: a file
// in a directory, and a program that puts all of them into one bundle.
type systemStore struct {
	dir, suffix string
	update      []string
	bundle      string
}

// systemStores are tried in this order; the first whose program is there counts.
var systemStores = []systemStore{
	{ // Debian, Ubuntu, Alpine
		"/usr/local/share/ca-certificates", ".crt",
		[]string{"update-ca-certificates"}, "/etc/ssl/certs/ca-certificates.crt",
	},
	{ // Fedora, RHEL and their kin
		"/etc/pki/ca-trust/source/anchors", ".pem",
		[]string{"update-ca-trust", "extract"}, "/etc/pki/tls/certs/ca-bundle.crt",
	},
}

// SystemStore is the store of this machine with a place in it for one authority.
type SystemStore struct {
	store systemStore
	Path  string // of the authority in it
}

// OpenSystemStore finds this machine's store; name tells one authority from others.
func OpenSystemStore(name string) (SystemStore, error) {
	var programs []string
	for _, s := range systemStores {
		if _, err := exec.LookPath(s.update[0]); err == nil {
			return SystemStore{s, filepath.Join(s.dir, "wrenn-ca-"+name+s.suffix)}, nil
		}
		programs = append(programs, s.update[0])
	}
	return SystemStore{}, fmt.Errorf("this system has none of %s: install ca-certificates, or add the authority to the system's store by hand", strings.Join(programs, ", "))
}

// Bundle is the file with all authorities that the system trusts.
func (s SystemStore) Bundle() string { return s.store.bundle }

// Installed reports whether the store has exactly this authority.
func (s SystemStore) Installed(a *Authority) bool {
	data, err := os.ReadFile(s.Path)
	return err == nil && string(data) == string(a.PEM())
}

// Install makes the programs of this machine trust the authority, and no other
// that was installed under the same name.
func (s SystemStore) Install(ctx context.Context, a *Authority) error {
	err := os.MkdirAll(s.store.dir, 0o755)
	if err == nil {
		err = writeFile(s.Path, a.PEM(), 0o644)
	}
	if err != nil {
		return fmt.Errorf("install certificate authority: %w", err)
	}
	if err := s.refresh(ctx); err != nil {
		_ = os.Remove(s.Path)
		return fmt.Errorf("install certificate authority: %w", err)
	}
	return nil
}

// Uninstall takes it out again. It reports false when it was not there.
func (s SystemStore) Uninstall(ctx context.Context) (bool, error) {
	err := os.Remove(s.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err == nil {
		err = s.refresh(ctx)
	}
	if err != nil {
		return true, fmt.Errorf("uninstall certificate authority: %w", err)
	}
	return true, nil
}

func (s SystemStore) refresh(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, s.store.update[0], s.store.update[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(s.store.update, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}
