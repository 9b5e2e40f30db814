package client_test

import (
	"bytes"
	"crypto/rand"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// tree describes a directory: path, mode, and contents or target.
func tree(t *testing.T, dir string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		info, err := entry.Info()
		if err != nil {
			return err
		}
		found[name] = info.Mode().String()
		switch {
		case info.Mode().IsRegular():
			data, err := os.ReadFile(path)
			found[name] += " " + string(data)
			return err
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := os.Readlink(path)
			found[name] += " " + target
			return err
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func TestADirectoryGoesInAndComesOutTheSame(t *testing.T) {
	s := open(t)
	src, inside, back := t.TempDir(), filepath.Join(t.TempDir(), "a", "inside"), filepath.Join(t.TempDir(), "back")
	big := make([]byte, 5<<20)
	rand.Read(big)
	os.MkdirAll(filepath.Join(src, "empty"), 0o755)
	os.MkdirAll(filepath.Join(src, "sub/é x"), 0o755)
	os.WriteFile(filepath.Join(src, "sub/é x/big"), big, 0o600)
	os.WriteFile(filepath.Join(src, strings.Repeat("long", 60)), nil, 0o644)
	os.WriteFile(filepath.Join(src, "program"), []byte("#!/bin/sh\n"), 0o755)
	os.Symlink("sub/é x", filepath.Join(src, "link"))
	os.Symlink("/nowhere", filepath.Join(src, "broken"))
	if err := s.Upload(t.Context(), src, inside, ""); err != nil {
		t.Fatal(err)
	}
	want := tree(t, src)
	if diff := cmp.Diff(want, tree(t, inside)); diff != "" {
		t.Fatalf("after upload: %.2000s", diff)
	}
	if err := s.Download(t.Context(), inside, back, "", func(name string) { t.Errorf("skipped %s", name) }); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, tree(t, back)); diff != "" {
		t.Errorf("after download: %.2000s", diff)
	}
}

func TestCopiesSayWhatWentWrong(t *testing.T) {
	s := open(t)
	dir := t.TempDir()
	os.WriteFile(filepath.Join(dir, "file"), nil, 0o644)
	if err := s.Upload(t.Context(), filepath.Join(dir, "missing"), filepath.Join(dir, "x"), ""); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("upload of nothing: %v", err)
	}
	if err := s.Upload(t.Context(), dir, filepath.Join(dir, "file"), ""); err == nil {
		t.Error("upload into a file is no error")
	}
	if err := s.Download(t.Context(), filepath.Join(dir, "missing"), filepath.Join(dir, "y"), "", nil); err == nil || !strings.Contains(err.Error(), "tar in the sandbox") {
		t.Errorf("download of nothing: %v", err)
	}
	if err := s.Download(t.Context(), dir, filepath.Join(dir, "file"), "", nil); err == nil {
		t.Error("download into a file is no error")
	}
	var out bytes.Buffer
	if err := s.Archive(t.Context(), dir, &out, ""); err != nil || out.Len() == 0 {
		t.Errorf("archive: %d bytes, %v", out.Len(), err)
	}
}
