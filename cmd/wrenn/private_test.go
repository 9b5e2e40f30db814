package main

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/wrenn/wrenn/internal/store/sqlite"
)

func TestNothingInTheDataDirectoryIsOpenToOthers(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T, d dataDir){
		"a new one": func(*testing.T, dataDir) {},
		"one that was open": func(t *testing.T, d dataDir) {
			for _, path := range []string{d.templates(), d.sandboxes(), filepath.Dir(d.log())} {
				if err := os.MkdirAll(path, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			for _, path := range []string{d.database(), d.database() + "-wal"} {
				if err := os.WriteFile(path, nil, 0o644); err != nil {
					t.Fatal(err)
				}
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			d := dataDir(t.TempDir())
			prepare(t, d)
			if err := d.keepPrivate(); err != nil {
				t.Fatal(err)
			}
			db, err := sqlite.Open(context.Background(), d.database())
			if err != nil {
				t.Fatal(err)
			}
			defer db.Close()
			entries, err := os.ReadDir(string(d))
			if err != nil || len(entries) < 6 {
				t.Fatalf("%v, %v", entries, err)
			}
			for _, e := range entries {
				info, err := e.Info()
				if err != nil {
					t.Fatal(err)
				}
				if info.Mode().Perm()&fs.FileMode(0o077) != 0 {
					t.Errorf("%s is %v", e.Name(), info.Mode())
				}
			}
		})
	}
}
