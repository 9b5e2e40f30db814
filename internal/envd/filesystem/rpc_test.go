package filesystem

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"testing"
	"time"

	"connectrpc.com/connect"

	rpc "github.com/wrenn/wrenn/api/proto/filesystem"
	"github.com/wrenn/wrenn/api/proto/filesystem/filesystemconnect"
	"github.com/wrenn/wrenn/internal/envd/settings"
)

func service(t testing.TB) *Service {
	s := NewService(&settings.Settings{}, slog.New(slog.DiscardHandler))
	t.Cleanup(s.Close)
	return s
}

// Only what changes nothing gets input at random: the paths are the input's.
func FuzzRequestsThatRead(f *testing.F) {
	f.Add("Stat", []byte(`{"path":"/proc/self/../x"}`))
	f.Add("ListDir", []byte(`{"path":"/dev","depth":2}`))
	f.Add("ListDir", []byte(`{"path":"~","depth":-1}`))
	f.Add("GetWatcherEvents", []byte(`{"watcherId":"\ufffd"}`))
	f.Add("RemoveWatcher", []byte(`{"watcherId":1}`))
	_, handler := filesystemconnect.NewFilesystemHandler(service(f))
	f.Fuzz(func(t *testing.T, method string, body []byte) {
		switch method {
		case "Stat", "ListDir", "GetWatcherEvents", "RemoveWatcher":
		default:
			method = "Stat"
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond) // a listing of all is asked for too
		defer cancel()
		r := httptest.NewRequestWithContext(ctx, "POST", "/filesystem.Filesystem/"+method, bytes.NewReader(body))
		r.Header.Set("Content-Type", "application/json")
		w := httptest.NewRecorder()
		handler.ServeHTTP(w, r)
		if !json.Valid(w.Body.Bytes()) {
			t.Errorf("%s %q: %d %.200q", method, body, w.Code, w.Body)
		}
		if w.Code == http.StatusInternalServerError {
			t.Errorf("%s %q: %s", method, body, w.Body)
		}
	})
}

func TestRefusalsSayWhatIsWrong(t *testing.T) {
	s, dir := service(t), t.TempDir()
	must(t, os.Mkdir(dir+"/d", 0o755), os.WriteFile(dir+"/f", nil, 0o644), os.Symlink("loop", dir+"/loop"))
	remove := func(path string) error {
		_, err := s.Remove(t.Context(), &rpc.RemoveRequest{Path: path})
		return err
	}
	mv := func(from, to string) error {
		_, err := s.Move(t.Context(), &rpc.MoveRequest{Source: from, Destination: to})
		return err
	}
	mkdir := func(path string) error {
		_, err := s.MakeDir(t.Context(), &rpc.MakeDirRequest{Path: path})
		return err
	}
	mounted := otherFS(t, "1m")
	must(t, os.WriteFile(mounted+"/f", nil, 0o644))
	for _, tc := range []struct {
		name string
		err  error
		code connect.Code
	}{
		{"removing the root", remove("/"), connect.CodeInvalidArgument},
		{"removing /proc", remove("/proc"), connect.CodeFailedPrecondition},
		{"removing a mount point", remove(mounted), connect.CodeFailedPrecondition},
		{"moving a directory into itself", mv(dir+"/d", dir+"/d/x/y"), connect.CodeInvalidArgument},
		{"moving a file onto a directory", mv(dir+"/f", dir+"/d"), connect.CodeInvalidArgument},
		{"moving nothing", mv(dir+"/none", dir+"/x/y"), connect.CodeNotFound},
		{"moving a mount point", mv(mounted, dir+"/moved"), connect.CodeFailedPrecondition},
		{"making a directory in a file", mkdir(dir + "/f/x"), connect.CodeInvalidArgument},
		{"making a directory in /proc", mkdir("/proc/x"), connect.CodeNotFound},
		{"making a directory at a link to itself", mkdir(dir + "/loop"), connect.CodeFailedPrecondition},
	} {
		if connect.CodeOf(tc.err) != tc.code || tc.err == nil {
			t.Errorf("%s: got %v, want %v", tc.name, tc.err, tc.code)
		}
	}
	must(t, remove(dir+"/none"), remove(dir+"/loop"), mv(dir+"/d", dir+"/d"), mv(dir+"/f", dir+"/f"))
	if got := names(t, dir); got != "d f" {
		t.Errorf("left is %s", got)
	}
	if _, err := os.Stat(mounted + "/f"); err != nil {
		t.Errorf("a refused remove emptied what is mounted: %v", err)
	}
}

func TestABigDirectoryIsListedAndABiggerTreeRefused(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 100,000 files")
	}
	s, dir := service(t), otherFS(t, "64m")
	for i := range 100_000 {
		must(t, os.WriteFile(fmt.Sprintf("%s/f%06d", dir, i), nil, 0o644))
	}
	started := time.Now()
	resp, err := s.ListDir(t.Context(), &rpc.ListDirRequest{Path: dir})
	if err != nil || len(resp.GetEntries()) != 100_000 || resp.GetEntries()[99_999].GetName() != "f099999" {
		t.Fatalf("%d entries, %v", len(resp.GetEntries()), err)
	}
	t.Logf("listed in %v", time.Since(started))
	l := lister{ctx: t.Context(), entries: make([]*rpc.EntryInfo, maxEntries-1)}
	if err := l.list(dir, 1); connect.CodeOf(rpcError("list", err)) != connect.CodeResourceExhausted {
		t.Errorf("beyond the limit: %v", err)
	}
}
