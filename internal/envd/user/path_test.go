package user

import (
	"errors"
	"path/filepath"
	"strings"
	"testing"
)

func TestResolvePath(t *testing.T) {
	for _, tc := range []struct{ name, path, workdir, want string }{
		{"nothing is home", "", "", "/home/u"},
		{"nothing is the working directory", "", "/work", "/work"},
		{"a relative working directory starts at home", "", "w", "/home/u/w"},
		{"a tilde in the working directory", "", "~/w", "/home/u/w"},
		{"relative starts at home, not at the working directory", "a/b", "/work", "/home/u/a/b"},
		{"tilde", "~", "/work", "/home/u"},
		{"tilde and slash", "~/x/../y", "", "/home/u/y"},
		{"absolute", "/etc//passwd/", "", "/etc/passwd"},
		{"up beyond the root", "../../../..", "", "/"},
		{"absolute up beyond the root", "/../../etc", "", "/etc"},
		{"a tilde inside", "a/~", "", "/home/u/a/~"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ResolvePath(tc.path, "/home/u", tc.workdir)
			if err != nil || got != tc.want {
				t.Errorf("got %q, %v, want %q", got, err, tc.want)
			}
		})
	}
	for _, path := range []string{"~other", "~other/x", "a\x00b", "\x00"} {
		if got, err := ResolvePath(path, "/home/u", ""); !errors.Is(err, ErrPath) {
			t.Errorf("%q: got %q, %v", path, got, err)
		}
	}
}

func FuzzResolvePathIsAbsoluteAndClean(f *testing.F) {
	for _, s := range []string{"", "~", "~/a", "~b", "/", "//", "../x", "a/../../b", "a\x00", "\xff", "~\\", "./~"} {
		f.Add(s, "/home/u", "/w")
		f.Add(s, "", "~")
	}
	f.Fuzz(func(t *testing.T, path, home, workdir string) {
		got, err := ResolvePath(path, home, workdir)
		if err != nil {
			if !errors.Is(err, ErrPath) {
				t.Errorf("error of another kind: %v", err)
			}
			return
		}
		if !filepath.IsAbs(got) || filepath.Clean(got) != got {
			t.Errorf("ResolvePath(%q, %q, %q) = %q", path, home, workdir, got)
		}
		if strings.Contains(path, "\x00") {
			t.Errorf("a path with NUL was taken: %q", path)
		}
	})
}
