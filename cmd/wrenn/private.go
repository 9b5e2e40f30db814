package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// keepPrivate closes what is in the data directory to the host's other users:
// the store tells about everybody's sandboxes, and a template's programs that
// run as root inside would run as root outside for whoever gets at them. The
// directory itself may be one that the operator made, and is left as it is.
func (d dataDir) keepPrivate() error {
	for _, path := range []string{d.templates(), d.agent(), filepath.Dir(d.log()), filepath.Dir(d.masterKey())} {
		if err := os.MkdirAll(path, 0o700); err != nil {
			return fmt.Errorf("make private directory: %w", err)
		}
		if err := os.Chmod(path, 0o700); err != nil {
			return fmt.Errorf("make directory private: %w", err)
		}
	}
	// SQLite gives its other files the mode of this one.
	db, err := os.OpenFile(d.database(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("make private database: %w", err)
	}
	if err := db.Close(); err != nil {
		return fmt.Errorf("make private database: %w", err)
	}
	for _, suffix := range []string{"", "-wal", "-shm"} {
		if err := os.Chmod(d.database()+suffix, 0o600); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("make database private: %w", err)
		}
	}
	return nil
}
