package client_test

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/client/clienttest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func create(t *testing.T, p *clienttest.Platform, metadata map[string]string) (*client.Client, client.Info) {
	t.Helper()
	c := p.Client()
	info, err := c.Create(t.Context(), client.CreateRequest{TemplateID: "base", Timeout: time.Minute, Metadata: metadata})
	if err != nil {
		t.Fatal(err)
	}
	return c, info
}

func TestASandboxIsFoundUntilItIsKilled(t *testing.T) {
	p := clienttest.New(t)
	c, info := create(t, p, nil)
	got, err := c.Get(t.Context(), info.SandboxID)
	if err != nil || got.EnvdAccessToken != info.EnvdAccessToken || got.State != "running" {
		t.Fatalf("get: %+v, %v", got, err)
	}
	if err := c.Kill(t.Context(), info.SandboxID); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Get(t.Context(), info.SandboxID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("get after kill: %v, want not found", err)
	}
	if err := c.Kill(t.Context(), info.SandboxID); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("second kill: %v, want not found", err)
	}
	_, err = c.Sandbox(info).Start(t.Context(), client.Command{Path: "true"})
	var gone *client.GoneError
	if !errors.As(err, &gone) || gone.SandboxID != info.SandboxID {
		t.Errorf("start after kill: %v, want a GoneError that names the sandbox", err)
	}
}

func TestErrorsCarryStatusAndMessage(t *testing.T) {
	p := clienttest.New(t)
	_, err := p.Client().Create(t.Context(), client.CreateRequest{TemplateID: "nope"})
	var answer *client.APIError
	if !errors.As(err, &answer) || answer.Status != 404 || answer.Message != "template 'nope' not found" {
		t.Errorf("create of an unknown template: %#v", err)
	}
	stranger, err := client.New(client.Config{APIURL: p.URL, APIKey: "wrong"})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := stranger.List(t.Context(), client.ListQuery{}); !errors.Is(err, sandbox.ErrUnauthenticated) {
		t.Errorf("list with a wrong key: %v", err)
	}
	plain := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "upstream broke "+strings.Repeat("x", 1<<20), 500)
	}))
	defer plain.Close()
	c, _ := client.New(client.Config{APIURL: plain.URL})
	if _, err := c.Get(t.Context(), "x"); err == nil || !strings.Contains(err.Error(), "upstream broke") || len(err.Error()) > 2000 {
		t.Errorf("an error in plain text: %.100v", err)
	}
}

func TestListGoesThroughAllPagesAndFilters(t *testing.T) {
	p := clienttest.New(t)
	p.PageSize = 2
	label := map[string]string{"ké y": "a+b&c=d %25/é"}
	c, marked := create(t, p, label)
	for range 4 {
		create(t, p, nil)
	}
	all, err := c.ListAll(t.Context(), client.ListQuery{})
	if err != nil || len(all) != 5 {
		t.Fatalf("list: %d sandboxes, %v, want 5", len(all), err)
	}
	if !slices.IsSortedFunc(all, func(a, b client.Info) int { return b.StartedAt.Compare(a.StartedAt) }) {
		t.Error("pages are out of order")
	}
	found, err := c.ListAll(t.Context(), client.ListQuery{Metadata: label})
	if err != nil || len(found) != 1 || found[0].SandboxID != marked.SandboxID {
		t.Errorf("list by metadata: %+v, %v", found, err)
	}
	before := len(p.Requests())
	if _, _, err := c.List(t.Context(), client.ListQuery{Metadata: map[string]string{"a": "b c"}, States: []string{"running", "paused"}}); err != nil {
		t.Fatal(err)
	}
	want := []string{"GET /v2/sandboxes?metadata=a%3Db%252520c&state=running%2Cpaused"} // what E2B's SDK sends
	if diff := cmp.Diff(want, p.Requests()[before:]); diff != "" {
		t.Error(diff)
	}
}

func TestTimeoutsAreRoundedUpToSeconds(t *testing.T) {
	p := clienttest.New(t)
	c, info := create(t, p, nil)
	if err := c.SetTimeout(t.Context(), info.SandboxID, time.Millisecond); err != nil {
		t.Errorf("set timeout of a millisecond: %v", err) // zero seconds would be refused
	}
	if err := c.Refresh(t.Context(), info.SandboxID, time.Hour); err != nil {
		t.Error(err)
	}
	got, _ := c.Get(t.Context(), info.SandboxID)
	if left := time.Until(got.EndAt); left < 59*time.Minute {
		t.Errorf("after a refresh of an hour it ends in %s", left)
	}
}

func TestCredentialsAreSavedForTheOwnerOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), client.CredentialsFile)
	want := client.Credentials{APIURL: "http://a", SandboxURL: "http://b", APIKey: "e2b_00", Domain: "d"}
	for range 2 { // the second time over the first
		if err := want.Save(path); err != nil {
			t.Fatal(err)
		}
	}
	got, err := client.LoadCredentials(path)
	if err != nil || got != want {
		t.Errorf("loaded %+v, %v", got, err)
	}
	info, _ := os.Stat(path)
	if info.Mode().Perm() != 0o600 {
		t.Errorf("mode %s, want 0600", info.Mode())
	}
	if left, _ := filepath.Glob(path + "?*"); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
	for _, bad := range []string{"", "{", `{"api_url":"http://a"}`} {
		os.WriteFile(path, []byte(bad), 0o600)
		if _, err := client.LoadCredentials(path); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("a file of %q: %v, want an error that names it", bad, err)
		}
	}
}

func TestTheEnvironmentComesBeforeTheFile(t *testing.T) {
	file := client.Credentials{APIURL: "http://file:1", APIKey: "filekey"}
	tests := []struct {
		name   string
		env    map[string]string
		noFile bool
		want   client.Credentials
		err    string
	}{
		{name: "nothing set: the file, and one address for both", want: client.Credentials{APIURL: "http://file:1", SandboxURL: "http://file:1", APIKey: "filekey"}},
		{name: "nothing at all", noFile: true, err: "no platform found: start one with `make up` or set E2B_API_URL and E2B_API_KEY"},
		{name: "address and key set", noFile: true, env: map[string]string{"E2B_API_URL": "http://env:2", "E2B_API_KEY": "k"}, want: client.Credentials{APIURL: "http://env:2", APIKey: "k"}},
		{name: "domain and key set", noFile: true, env: map[string]string{"E2B_DOMAIN": "x.test:8443", "E2B_API_KEY": "k"}, want: client.Credentials{APIURL: "https://api.x.test:8443", APIKey: "k", Domain: "x.test:8443"}},
		{name: "only a key set: for the platform of the file", env: map[string]string{"E2B_API_KEY": "k"}, want: client.Credentials{APIURL: "http://file:1", SandboxURL: "http://file:1", APIKey: "k"}},
		{name: "another address without a key: the file's key is not sent there", env: map[string]string{"E2B_API_URL": "http://env:2"}, err: "E2B_API_KEY is not"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			for _, name := range []string{"E2B_API_URL", "E2B_SANDBOX_URL", "E2B_API_KEY", "E2B_DOMAIN"} {
				t.Setenv(name, test.env[name])
			}
			dir := t.TempDir()
			if !test.noFile {
				if err := file.Save(filepath.Join(dir, client.CredentialsFile)); err != nil {
					t.Fatal(err)
				}
			}
			got, err := client.Environment(dir)
			if test.err != "" {
				if err == nil || !strings.Contains(err.Error(), test.err) {
					t.Errorf("error %v, want %q", err, test.err)
				}
				return
			}
			if err != nil || got != test.want {
				t.Errorf("got %+v, %v, want %+v", got, err, test.want)
			}
		})
	}
}

func TestAddressesThatAreNoURLsAreRefused(t *testing.T) {
	for _, bad := range []string{"", "localhost:3000", "ftp://x", "http://", "http://%zz"} {
		if _, err := client.New(client.Config{APIURL: bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestACallThatIsGivenUpReturnsAtOnce(t *testing.T) {
	hang := make(chan struct{})
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-hang }))
	defer server.Close()
	defer close(hang)
	c, _ := client.New(client.Config{APIURL: server.URL})
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(20*time.Millisecond, cancel)
	if _, err := c.Get(ctx, "x"); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want canceled", err)
	}
}
