package sqlite

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
	"github.com/wrenn/wrenn/internal/store/storetest"
)

// TestMain becomes the writer that TestAcknowledgedWritesSurviveKill kills.
func TestMain(m *testing.M) {
	if path := os.Getenv("SQLITE_TEST_WRITE"); path != "" {
		if err := writeForever(path); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestStore(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store {
		return open(t, filepath.Join(t.TempDir(), "a db?x=%41#.sqlite"))
	})
}

func TestADatabaseOfANewerSchemaIsRefused(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wrenn.db")
	s, err := Open(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.write.Exec(`INSERT INTO goose_db_version (version_id, is_applied) VALUES (999, 1)`); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(t.Context(), path); err == nil || !strings.Contains(err.Error(), "schema version 999") {
		t.Errorf("opened a newer database: %v", err)
	}
}

func TestSandboxesOfAnOlderSchemaAreAsTheyWere(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wrenn.db")
	s := open(t, path)
	if err := s.Teams().Insert(t.Context(), store.Team{ID: "t1", Slug: "t1"}); err != nil {
		t.Fatal(err)
	}
	b := storetest.Sandbox(7)
	if err := s.Sandboxes().Insert(t.Context(), b); err != nil {
		t.Fatal(err)
	}
	p, err := provider(s.write)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.DownTo(t.Context(), 2); err != nil {
		t.Fatal(err)
	}
	got, err := open(t, path).Sandboxes().Get(t.Context(), b.ID)
	if err != nil {
		t.Fatal(err)
	}
	b.Changed = b.Started // what is known of it
	if diff := cmp.Diff(b, got); diff != "" {
		t.Errorf("after the migration (-want +got):\n%s", diff)
	}
}

func TestTheDatabaseIsWhereItWasAskedToBe(t *testing.T) {
	dir := t.TempDir()
	open(t, filepath.Join(dir, "odd ?#%.db"))
	if _, err := os.Stat(filepath.Join(dir, "odd ?#%.db")); err != nil {
		t.Error(err)
	}
}

func TestAcknowledgedWritesSurviveKill(t *testing.T) {
	path := filepath.Join(t.TempDir(), "wrenn.db")
	inserted, moved := 0, 0
	for range 3 { // each time on what the killed one left
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), "SQLITE_TEST_WRITE="+path)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var acknowledged []string
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			acknowledged = append(acknowledged, lines.Text())
			if len(acknowledged) == 200 {
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		_ = cmd.Wait() // it was killed
		if len(acknowledged) < 200 {
			t.Fatalf("the writer stopped by itself after %d writes", len(acknowledged))
		}

		s, err := Open(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		for _, line := range acknowledged {
			what, id, _ := strings.Cut(line, " ")
			b, err := s.Sandboxes().Get(t.Context(), sandbox.ID(id))
			switch {
			case err != nil:
				t.Errorf("%s: %v", line, err)
			case what == "moved" && b.State != sandbox.Stopping:
				t.Errorf("%s: state is %s", line, b.State)
			case b.Spec.Metadata["k"] != "v":
				t.Errorf("%s: metadata is %v", line, b.Spec.Metadata)
			case what == "moved":
				moved++
			default:
				inserted++
			}
		}
		var verdict string
		if err := s.read.QueryRow(`PRAGMA integrity_check`).Scan(&verdict); err != nil || verdict != "ok" {
			t.Errorf("integrity check: %q, %v", verdict, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	t.Logf("%d inserts and %d moves acknowledged before three kills, all there", inserted, moved)
}

// writeForever says on standard output what it has written, after it was.
func writeForever(path string) error {
	ctx := context.Background()
	s, err := Open(ctx, path)
	if err != nil {
		return err
	}
	_ = s.Teams().Insert(ctx, store.Team{ID: "t1", Slug: "t1"}) // there from the second round on
	for i := 0; ; i++ {
		b := storetest.Sandbox(i)
		b.Spec.Metadata = map[string]string{"k": "v"}
		if err := s.Sandboxes().Insert(ctx, b); err != nil {
			return err
		}
		fmt.Println("inserted", b.ID)
		if err := s.Sandboxes().Transition(ctx, b.ID, sandbox.Running, store.Change{State: sandbox.Stopping}); err != nil {
			return err
		}
		fmt.Println("moved", b.ID)
	}
}
