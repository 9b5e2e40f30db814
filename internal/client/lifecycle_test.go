package client_test

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/client"
	"github.com/wrenn/wrenn/internal/client/clienttest"
	"github.com/wrenn/wrenn/internal/sandbox"
)

func TestAPausedSandboxIsGoneUntilItIsResumed(t *testing.T) {
	p := clienttest.New(t)
	c, info := create(t, p, nil)
	id := info.SandboxID
	if err := c.Pause(t.Context(), id, true); err != nil {
		t.Fatal(err)
	}
	if err := c.Pause(t.Context(), id, true); !errors.Is(err, sandbox.ErrConflict) {
		t.Errorf("second pause: %v, want a conflict", err)
	}
	var gone *client.GoneError
	if _, err := c.Sandbox(info).Start(t.Context(), client.Command{Path: "true"}); !errors.As(err, &gone) {
		t.Errorf("start in a paused sandbox: %v, want a GoneError", err)
	}
	for _, want := range []bool{true, false} {
		got, resumed, err := c.Connect(t.Context(), id, client.ConnectRequest{Timeout: 1500 * time.Millisecond, Cold: true})
		if err != nil || got.SandboxID != id || got.EnvdAccessToken != info.EnvdAccessToken || resumed != want {
			t.Errorf("connect: %+v, resumed %v, %v, want %v", got, resumed, err, want)
		}
	}
	requests := p.Requests()
	if got, want := requests[len(requests)-1], "POST /v2/sandboxes/"+id+`/connect {"timeout":2,"memory":false}`; got != want {
		t.Errorf("asked %s, want %s", got, want)
	}
	if _, _, err := c.Connect(t.Context(), "none", client.ConnectRequest{}); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("connect to an unknown one: %v", err)
	}
}

func TestEveryForkHasItsOwnOutcome(t *testing.T) {
	p := clienttest.New(t)
	c, info := create(t, p, nil)
	forks, err := c.Fork(t.Context(), info.SandboxID, 4, time.Minute)
	if err != nil || len(forks) != 4 {
		t.Fatalf("%d forks, %v", len(forks), err)
	}
	for i, f := range forks {
		if i == 2 { // the one that fails there
			if !errors.Is(f.Err, sandbox.ErrUnavailable) {
				t.Errorf("fork %d: %+v", i, f)
			}
			continue
		}
		if f.Err != nil || f.Sandbox.SandboxID == info.SandboxID || f.Sandbox.EnvdAccessToken == "" {
			t.Errorf("fork %d: %+v", i, f)
		}
	}
	if _, err := c.Fork(t.Context(), "none", 1, time.Minute); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("fork of an unknown one: %v", err)
	}
}

func TestSnapshotsAreListedByPages(t *testing.T) {
	p := clienttest.New(t)
	p.PageSize = 2
	c, info := create(t, p, nil)
	for _, name := range []string{"", "a", "", "b", ""} {
		if _, err := c.Snapshot(t.Context(), info.SandboxID, name); err != nil {
			t.Fatal(err)
		}
	}
	count := func(q client.SnapshotQuery, want int) {
		t.Helper()
		list, err := c.Snapshots(t.Context(), q)
		if err != nil || len(list) != want {
			t.Errorf("%+v: %d snapshots, %v, want %d", q, len(list), err, want)
		}
	}
	count(client.SnapshotQuery{}, 5)
	count(client.SnapshotQuery{SandboxID: info.SandboxID}, 5)
	count(client.SnapshotQuery{SandboxID: "other"}, 0)
	count(client.SnapshotQuery{Name: "a"}, 1)
	if err := c.DeleteSnapshot(t.Context(), "default/a:default"); err != nil { // a slash is part of the name
		t.Fatal(err)
	}
	count(client.SnapshotQuery{}, 4)
	if err := c.DeleteSnapshot(t.Context(), "a"); !errors.Is(err, sandbox.ErrNotFound) {
		t.Errorf("second delete: %v, want not found", err)
	}
}

func TestEventsAreAskedForUntilThereAreNoMore(t *testing.T) {
	var asked []string
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.RawQuery)
		after, _ := strconv.Atoi(r.URL.Query().Get("after"))
		w.Write([]byte("["))
		for seq := after + 1; seq <= min(after+1000, 1001); seq++ {
			if seq > after+1 {
				w.Write([]byte(","))
			}
			w.Write([]byte(`{"seq":` + strconv.Itoa(seq) + `,"durationMs":5}`))
		}
		w.Write([]byte("]"))
	}))
	defer server.Close()
	c, err := client.New(client.Config{APIURL: server.URL})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	events, err := c.Events(t.Context(), "x")
	if err != nil || len(events) != 1001 || events[1000].Seq != 1001 || events[0].Duration() != 5*time.Millisecond {
		t.Errorf("%d events, %v", len(events), err)
	}
	if diff := cmp.Diff([]string{"limit=1000&after=0", "limit=1000&after=1000"}, asked); diff != "" {
		t.Error(diff)
	}
}
