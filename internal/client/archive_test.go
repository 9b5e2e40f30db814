package client

import (
	"archive/tar"
	"bytes"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// archive makes a tar archive of headers; regular files contain "evil".
func archive(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		if h.Typeflag == tar.TypeReg {
			h.Size = 4
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			io.WriteString(w, "evil")
		}
	}
	w.Close()
	return buf.Bytes()
}

// unpackBeside unpacks into a directory with neighbours that must stay as they are.
func unpackBeside(t testing.TB, data []byte) (dir string, skipped []string, err error) {
	t.Helper()
	top := t.TempDir()
	dir = filepath.Join(top, "dir")
	os.Mkdir(dir, 0o755)
	os.WriteFile(filepath.Join(top, "neighbour"), []byte("good"), 0o640)
	root, err := os.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	err = unpack(bytes.NewReader(data), root, func(name string) { skipped = append(skipped, name) })
	entries, _ := os.ReadDir(top)
	got, _ := os.ReadFile(filepath.Join(top, "neighbour"))
	info, statErr := os.Lstat(filepath.Join(top, "neighbour"))
	if len(entries) != 2 || string(got) != "good" || statErr != nil || info.Mode() != 0o640 {
		t.Errorf("something outside the directory was changed: %v, %q, %v", entries, got, info)
	}
	return dir, skipped, err
}

func TestUnpackStaysInsideWhateverTheArchiveSays(t *testing.T) {
	file := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name} }
	link := func(name, target string) tar.Header {
		return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
	}
	tests := []struct {
		name    string
		headers []tar.Header
	}{
		{"parent", []tar.Header{file("../neighbour")}},
		{"parent behind a directory", []tar.Header{file("a/../../neighbour")}},
		{"absolute", []tar.Header{file("/neighbour")}},
		{"through a link to a directory", []tar.Header{link("out", ".."), file("out/neighbour")}},
		{"through a chain of links", []tar.Header{link("a", "b"), link("b", ".."), file("a/neighbour")}},
		{"directory mode through a link", []tar.Header{{Typeflag: tar.TypeDir, Name: "d"}, link("d", "../neighbour")}},
		{"directory in place of a link", []tar.Header{link("d", ".."), {Typeflag: tar.TypeDir, Name: "d/new"}}},
		{"hard link out", []tar.Header{{Typeflag: tar.TypeLink, Name: "h", Linkname: "../neighbour"}, file("h")}},
		{"hard link to a link", []tar.Header{link("s", "../neighbour"), {Typeflag: tar.TypeLink, Name: "h", Linkname: "s"}, file("h")}},
		{"the directory itself", []tar.Header{file(".")}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			unpackBeside(t, archive(t, test.headers...)) // an error is fine, a change outside is not
		})
	}
	// A file over a link replaces the link, it does not go where the link points.
	dir, _, err := unpackBeside(t, archive(t, link("f", "../neighbour"), file("f")))
	if got, _ := os.ReadFile(filepath.Join(dir, "f")); err != nil || string(got) != "evil" {
		t.Errorf("file over a link: %q, %v", got, err)
	}
}

func TestUnpackKeepsModesButNoPowers(t *testing.T) {
	dir, skipped, err := unpackBeside(t, archive(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "ro/", Mode: 0o500},
		tar.Header{Typeflag: tar.TypeReg, Name: "ro/suid", Mode: 0o4711},
		tar.Header{Typeflag: tar.TypeReg, Name: "deep/without/dirs", Mode: 0o600},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "ro/suid"},
		tar.Header{Typeflag: tar.TypeFifo, Name: "fifo"},
		tar.Header{Typeflag: tar.TypeChar, Name: "null", Devmajor: 1, Devminor: 3},
	))
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{"ro": fs.ModeDir | 0o500, "ro/suid": 0o711, "deep/without/dirs": 0o600} {
		if info, err := os.Lstat(filepath.Join(dir, name)); err != nil || info.Mode() != want {
			t.Errorf("%s: %v, %v, want %v", name, info, err, want)
		}
	}
	if target, _ := os.Readlink(filepath.Join(dir, "link")); target != "ro/suid" {
		t.Errorf("link points to %q", target)
	}
	if strings.Join(skipped, " ") != "fifo null" {
		t.Errorf("skipped %q, want fifo and null", skipped)
	}
}

func TestATruncatedArchiveIsAnError(t *testing.T) {
	whole := archive(t, tar.Header{Typeflag: tar.TypeReg, Name: "f"})
	if _, _, err := unpackBeside(t, whole[:514]); err == nil {
		t.Error("half a file is taken for a whole one")
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(archive(f, tar.Header{Typeflag: tar.TypeSymlink, Name: "a", Linkname: ".."}, tar.Header{Typeflag: tar.TypeReg, Name: "a/neighbour"}))
	f.Add(archive(f, tar.Header{Typeflag: tar.TypeDir, Name: "d"}, tar.Header{Typeflag: tar.TypeLink, Name: "h", Linkname: "../neighbour"}))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 1<<16 {
			return
		}
		unpackBeside(t, data)
	})
}
