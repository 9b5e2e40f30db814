package envd_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/wrenn/wrenn/api/proto/filesystem"
)

// tree makes files (text) and directories (names with a slash at the end).
func tree(t *testing.T, root string, names ...string) {
	t.Helper()
	for _, name := range names {
		path := filepath.Join(root, name)
		var err error
		if strings.HasSuffix(name, "/") {
			err = os.MkdirAll(path, 0o755)
		} else {
			err = os.WriteFile(path, []byte(name), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestListDir(t *testing.T) {
	dir := t.TempDir()
	tree(t, dir, "a/", "a/b/", "a/b/c.txt", "f.txt", "bad\xffname")
	os.Symlink("a", dir+"/link")
	os.Symlink("nowhere", dir+"/dangling")
	os.Symlink(".", dir+"/a/self")
	os.Symlink(dir+"/a", dir+"/root-link")
	c := startAgent(t).filesystem(connect.WithProtoJSON())
	for _, tc := range []struct {
		name, path string
		depth      uint32
		want       []string
	}{
		{"no depth is one level", "", 0, []string{"a", "bad\uFFFDname", "dangling", "f.txt", "link", "root-link"}},
		{"two levels", "", 2, []string{"a", "a/b", "a/self", "bad\uFFFDname", "dangling", "f.txt", "link", "root-link"}},
		{"links below are not followed", "a", 100, []string{"a/b", "a/b/c.txt", "a/self"}},
		{"a link asked for is followed and keeps its name", "root-link", 1, []string{"root-link/b", "root-link/self"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			resp, err := c.ListDir(t.Context(), &filesystem.ListDirRequest{Path: filepath.Join(dir, tc.path), Depth: tc.depth})
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, e := range resp.GetEntries() {
				got = append(got, strings.TrimPrefix(e.GetPath(), dir+"/"))
			}
			if !slices.Equal(got, tc.want) {
				t.Errorf("got %q, want %q", got, tc.want)
			}
		})
	}
	_, err := c.ListDir(t.Context(), &filesystem.ListDirRequest{Path: dir + "/none"})
	wantCode(t, err, connect.CodeNotFound, "no such file")
	_, err = c.ListDir(t.Context(), &filesystem.ListDirRequest{Path: dir + "/f.txt"})
	wantCode(t, err, connect.CodeInvalidArgument, "not a directory")
	os.Symlink("loop", dir+"/loop")
	_, err = c.ListDir(t.Context(), &filesystem.ListDirRequest{Path: dir + "/loop"})
	wantCode(t, err, connect.CodeFailedPrecondition, "symbolic links")
}

func TestStatTellsLinkAndTarget(t *testing.T) {
	dir := t.TempDir()
	tree(t, dir, "f", "d/")
	os.Chmod(dir+"/f", 0o640)
	os.Symlink("f", dir+"/l")
	os.Symlink("gone", dir+"/x")
	c := startAgent(t).filesystem()
	for _, tc := range []struct {
		name   string
		kind   filesystem.FileType
		mode   uint32
		perms  string
		target string
	}{
		{"f", filesystem.FileType_FILE_TYPE_FILE, 0o640, "-rw-r-----", ""},
		{"d", filesystem.FileType_FILE_TYPE_DIRECTORY, 0o755, "drwxr-xr-x", ""},
		{"l", filesystem.FileType_FILE_TYPE_FILE, 0o640, "Lrwxrwxrwx", dir + "/f"},
		{"x", filesystem.FileType_FILE_TYPE_UNSPECIFIED, 0, "Lrwxrwxrwx", dir + "/x"},
	} {
		resp, err := c.Stat(t.Context(), &filesystem.StatRequest{Path: dir + "/" + tc.name})
		if err != nil {
			t.Fatal(err)
		}
		e := resp.GetEntry()
		if e.GetType() != tc.kind || e.GetMode() != tc.mode || e.GetPermissions() != tc.perms || e.GetSymlinkTarget() != tc.target ||
			e.GetName() != tc.name || e.GetPath() != dir+"/"+tc.name || e.GetModifiedTime().AsTime().IsZero() {
			t.Errorf("%s: got %v", tc.name, e)
		}
	}
	_, err := c.Stat(t.Context(), &filesystem.StatRequest{Path: dir + "/none"})
	wantCode(t, err, connect.CodeNotFound, "")
	_, err = c.Stat(t.Context(), &filesystem.StatRequest{Path: "~who/x"})
	wantCode(t, err, connect.CodeInvalidArgument, "")
	_, err = c.Stat(t.Context(), &filesystem.StatRequest{Path: "/a\x00b"})
	wantCode(t, err, connect.CodeInvalidArgument, "NUL")
	_, err = c.Stat(t.Context(), &filesystem.StatRequest{Path: "/" + strings.Repeat("x", 5000)})
	wantCode(t, err, connect.CodeInvalidArgument, "too long")
}

func TestMakeMoveRemove(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	c := startAgent(t).filesystem(connect.WithInterceptors(basicUser("nobody")))
	ctx := t.Context()
	made, err := c.MakeDir(ctx, &filesystem.MakeDirRequest{Path: dir + "/x/y/z"})
	if err != nil || made.GetEntry().GetOwner() != "nobody" || made.GetEntry().GetPermissions() != "drwxr-xr-x" {
		t.Fatalf("got %v, %v", made, err)
	}
	parent, err := c.Stat(ctx, &filesystem.StatRequest{Path: dir + "/x"})
	if err != nil || parent.GetEntry().GetOwner() != "nobody" {
		t.Errorf("the parent is %v, %v", parent, err)
	}
	_, err = c.MakeDir(ctx, &filesystem.MakeDirRequest{Path: dir + "/x/y/z"})
	wantCode(t, err, connect.CodeAlreadyExists, "directory already exists")
	tree(t, dir, "file", "full/", "full/f")
	_, err = c.MakeDir(ctx, &filesystem.MakeDirRequest{Path: dir + "/file"})
	wantCode(t, err, connect.CodeInvalidArgument, "not a directory")
	_, err = c.MakeDir(ctx, &filesystem.MakeDirRequest{Path: dir + "/file/below"})
	wantCode(t, err, connect.CodeInvalidArgument, "not a directory")

	moved, err := c.Move(ctx, &filesystem.MoveRequest{Source: dir + "/file", Destination: dir + "/new/place"})
	if err != nil || moved.GetEntry().GetPath() != dir+"/new/place" {
		t.Fatalf("got %v, %v", moved, err)
	}
	_, err = c.Move(ctx, &filesystem.MoveRequest{Source: dir + "/none", Destination: dir + "/made/for/nothing"})
	wantCode(t, err, connect.CodeNotFound, "")
	if _, err := os.Stat(dir + "/made"); err == nil {
		t.Error("a refused move made directories")
	}
	_, err = c.Move(ctx, &filesystem.MoveRequest{Source: dir + "/x", Destination: dir + "/x/y/inside"})
	wantCode(t, err, connect.CodeInvalidArgument, "")
	for range 2 { // what is not there counts as removed
		if _, err := c.Remove(ctx, &filesystem.RemoveRequest{Path: dir + "/full"}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(dir + "/full/f"); !os.IsNotExist(err) {
		t.Errorf("the directory is still there: %v", err)
	}
	_, err = c.Remove(ctx, &filesystem.RemoveRequest{Path: "/"})
	wantCode(t, err, connect.CodeInvalidArgument, "root")
}

// watching collects a watch's events as "TYPE name".
type watching struct {
	t      *testing.T
	stream *connect.ServerStreamForClient[filesystem.WatchDirResponse]
}

func watchDir(t *testing.T, a *agent, req *filesystem.WatchDirRequest) *watching {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	s, err := a.filesystem(connect.WithProtoJSON()).WatchDir(ctx, req)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cancel(); s.Close() })
	if !s.Receive() || s.Msg().GetStart() == nil {
		t.Fatalf("first event is %v, %v", s.Msg(), s.Err())
	}
	return &watching{t, s}
}

// until returns the events up to the one wanted.
func (w *watching) until(last string) []string {
	w.t.Helper()
	var got []string
	for w.stream.Receive() {
		e := w.stream.Msg().GetFilesystem()
		if e == nil {
			continue
		}
		got = append(got, strings.TrimPrefix(e.GetType().String(), "EVENT_TYPE_")+" "+e.GetName())
		if got[len(got)-1] == last {
			return got
		}
	}
	w.t.Fatalf("%q never came: %v after %q", last, w.stream.Err(), got)
	return nil
}

func TestWatchTellsWhatHappens(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	tree(t, dir, "old", "sub/")
	w := watchDir(t, a, &filesystem.WatchDirRequest{Path: dir})
	tree(t, dir, "new", "sub/unseen")
	os.Chmod(dir+"/new", 0o600)
	os.Rename(dir+"/new", dir+"/renamed")
	os.Remove(dir + "/old")
	tree(t, dir, "end")
	got := w.until("CREATE end")
	want := []string{"CREATE new", "WRITE new", "CHMOD new", "RENAME new", "CREATE renamed", "REMOVE old", "CREATE end"}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestUploadsAreSeenAsCreationAndWriteOfTheFile(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	w := watchDir(t, a, &filesystem.WatchDirRequest{Path: dir})
	for range 2 {
		if status, _, body := a.call(t, "POST", "/files?path="+dir+"/f", "text", "Content-Type", "application/octet-stream"); status != 200 {
			t.Fatalf("%d %s", status, body)
		}
		if got := w.until("WRITE f"); !slices.Equal(got, []string{"CREATE f", "WRITE f"}) {
			t.Errorf("got %q", got)
		}
	}
}

func TestRecursiveWatchMissesNothingInNewDirectories(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	w := watchDir(t, a, &filesystem.WatchDirRequest{Path: dir, Recursive: true})
	want := map[string]int{}
	for i := range 50 {
		// Made in one go: much of it is there before the directory is watched.
		sub := fmt.Sprintf("d%d/e/f/", i)
		tree(t, dir, sub, sub+"file")
		for _, name := range []string{fmt.Sprintf("d%d", i), fmt.Sprintf("d%d/e", i), fmt.Sprintf("d%d/e/f", i), fmt.Sprintf("d%d/e/f/file", i)} {
			want["CREATE "+name] = 1
		}
	}
	tree(t, dir, "end")
	got := map[string]int{}
	events := w.until("CREATE end")
	// The last directories may be looked into only after the end was made.
	for _, e := range events {
		if strings.HasPrefix(e, "CREATE d") {
			got[e]++
		}
	}
	for e, n := range want {
		if got[e] != n {
			t.Errorf("%s came %d times", e, got[e])
		}
	}
}

func TestRecursiveWatchFollowsMovedDirectories(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	tree(t, dir, "a/", "a/deep/")
	w := watchDir(t, a, &filesystem.WatchDirRequest{Path: dir, Recursive: true})
	os.Rename(dir+"/a", dir+"/b")
	w.until("CREATE b/deep")
	tree(t, dir, "b/deep/file")
	w.until("CREATE b/deep/file")
	os.RemoveAll(dir + "/b")
	w.until("REMOVE b")
}

func TestWatchRefusesWhatIsNoDirectory(t *testing.T) {
	a := startAgent(t)
	dir := t.TempDir()
	tree(t, dir, "f")
	for path, code := range map[string]connect.Code{dir + "/none": connect.CodeNotFound, dir + "/f": connect.CodeInvalidArgument} {
		s, err := a.filesystem().WatchDir(t.Context(), &filesystem.WatchDirRequest{Path: path})
		if err == nil {
			s.Receive()
			err = s.Err()
			s.Close()
		}
		wantCode(t, err, code, "")
		_, err = a.filesystem().CreateWatcher(t.Context(), &filesystem.CreateWatcherRequest{Path: path})
		wantCode(t, err, code, "")
	}
}

func TestPolledWatcherKeepsEventsUntilTheyAreFetched(t *testing.T) {
	a := startAgent(t)
	c, ctx, dir := a.filesystem(), t.Context(), t.TempDir()
	made, err := c.CreateWatcher(ctx, &filesystem.CreateWatcherRequest{Path: dir, IncludeEntry: true})
	if err != nil {
		t.Fatal(err)
	}
	id := made.GetWatcherId()
	tree(t, dir, "x")
	var got []*filesystem.FilesystemEvent
	eventually(t, "two events", func() bool {
		resp, err := c.GetWatcherEvents(ctx, &filesystem.GetWatcherEventsRequest{WatcherId: id})
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, resp.GetEvents()...)
		return len(got) >= 2
	})
	if got[0].GetName() != "x" || got[0].GetEntry().GetPath() != dir+"/x" || got[1].GetType() != filesystem.EventType_EVENT_TYPE_WRITE {
		t.Errorf("got %v", got)
	}
	if _, err := c.RemoveWatcher(ctx, &filesystem.RemoveWatcherRequest{WatcherId: id}); err != nil {
		t.Fatal(err)
	}
	_, err = c.GetWatcherEvents(ctx, &filesystem.GetWatcherEventsRequest{WatcherId: id})
	wantCode(t, err, connect.CodeNotFound, id)
	_, err = c.RemoveWatcher(ctx, &filesystem.RemoveWatcherRequest{WatcherId: id})
	wantCode(t, err, connect.CodeNotFound, id)
}

func TestLostEventsAreReported(t *testing.T) {
	a := startAgent(t)
	c, ctx, dir := a.filesystem(), t.Context(), t.TempDir()
	made, err := c.CreateWatcher(ctx, &filesystem.CreateWatcherRequest{Path: dir})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(dir + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	g, err := os.Create(dir + "/g")
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	for range 70000 { // in turns, for the kernel merges equal events
		f.WriteString("x")
		g.WriteString("x")
	}
	var last error
	eventually(t, "the loss is reported", func() bool {
		_, last = c.GetWatcherEvents(ctx, &filesystem.GetWatcherEventsRequest{WatcherId: made.GetWatcherId()})
		return last != nil
	})
	wantCode(t, last, connect.CodeDataLoss, "events were lost")
}
