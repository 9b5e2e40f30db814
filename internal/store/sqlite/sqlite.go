// Package sqlite keeps the control plane's state in one SQLite file. Its SQL is
// the part of the language that PostgreSQL has too.
package sqlite

import (
	"context"
	"database/sql"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"time"

	"github.com/pressly/goose/v3"
	driver "modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/wrenn/wrenn/internal/sandbox"
	"github.com/wrenn/wrenn/internal/store"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Store is a store.Store in one file.
type Store struct {
	write *sql.DB // one connection: SQLite has one writer, waiting here is cheaper than its busy loop
	read  *sql.DB
	index *os.File // see reserve; may be nil
	stmts statements
}

// Open opens the database file at path, makes it when it is not there, and
// brings its schema up to date. A database of a newer schema is refused.
func Open(ctx context.Context, path string) (_ *Store, err error) {
	s := &Store{}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.write, err = openPool(path, "immediate", 1); err != nil {
		return nil, err
	}
	if err = migrate(ctx, s.write); err != nil {
		return nil, err
	}
	if s.read, err = openPool(path, "deferred", 4); err != nil {
		return nil, err
	}
	if err = s.prepare(ctx); err != nil {
		return nil, err
	}
	if s.index, err = reserve(path); err != nil {
		return nil, err
	}
	return s, nil
}

func openPool(path, txlock string, connections int) (*sql.DB, error) {
	// With WAL and synchronous=NORMAL a commit is a write without a sync: it
	// survives the death of the process, and a power cut loses at most the last
	// moments, never the file's integrity.
	q := url.Values{"_txlock": {txlock}, "_pragma": {
		"busy_timeout(5000)", "journal_mode(WAL)", "synchronous(NORMAL)", "foreign_keys(ON)",
	}}
	// As a URI with an escaped path: '?' and '%' are legal in file names.
	dsn := (&url.URL{Scheme: "file", Opaque: (&url.URL{Path: path}).EscapedPath(), RawQuery: q.Encode()}).String()
	db, err := sql.Open("sqlite", dsn)
	if err != nil {
		return nil, fmt.Errorf("open database %s: %w", path, err)
	}
	db.SetMaxOpenConns(connections)
	db.SetMaxIdleConns(connections)
	return db, nil
}

func provider(db *sql.DB) (*goose.Provider, error) {
	dir, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, db, dir)
	if err != nil {
		return nil, fmt.Errorf("prepare migrations: %w", err)
	}
	return p, nil
}

func migrate(ctx context.Context, db *sql.DB) error {
	p, err := provider(db)
	if err != nil {
		return err
	}
	have, want, err := p.GetVersions(ctx)
	var sqliteErr *driver.Error
	if errors.As(err, &sqliteErr) && (sqliteErr.Code() == sqlite3.SQLITE_NOTADB || sqliteErr.Code()&0xff == sqlite3.SQLITE_CORRUPT) {
		return fmt.Errorf("the database is damaged: restore it from a backup, or move it away, with its -wal and -shm, to start without any records, which ends the sandboxes that run: %w", err)
	}
	if err != nil {
		return fmt.Errorf("read database schema version: %w", err)
	}
	if have > want {
		return fmt.Errorf("database has schema version %d, this program knows up to %d: use the newer program or another data directory", have, want)
	}
	if _, err := p.Up(ctx); err != nil {
		return fmt.Errorf("migrate database: %w", err)
	}
	return nil
}

// Close closes the file. Calls in progress end first.
func (s *Store) Close() error {
	var errs []error
	for _, db := range []*sql.DB{s.read, s.write} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	if s.index != nil {
		errs = append(errs, s.index.Close())
	}
	return errors.Join(errs...)
}

// Teams implements store.Store.
func (s *Store) Teams() store.Teams { return teams{s} }

// APIKeys implements store.Store.
func (s *Store) APIKeys() store.APIKeys { return apiKeys{s} }

// Templates implements store.Store.
func (s *Store) Templates() store.Templates { return templates{s} }

// Sandboxes implements store.Store.
func (s *Store) Sandboxes() store.Sandboxes { return sandboxes{s} }

// Events implements store.Store.
func (s *Store) Events() store.Events { return events{s} }

// Snapshots implements store.Store.
func (s *Store) Snapshots() store.Snapshots { return snapshots{s} }

// statements are the queries of the path that every create and kill goes.
type statements struct {
	sandboxInsert, metadataInsert, eventInsert, sandboxGet, transitionEvent, transition *sql.Stmt
}

func (s *Store) prepare(ctx context.Context) (err error) {
	for _, p := range []struct {
		stmt  **sql.Stmt
		db    *sql.DB
		query string
	}{
		{&s.stmts.sandboxInsert, s.write, sandboxInsertSQL},
		{&s.stmts.metadataInsert, s.write, metadataInsertSQL},
		{&s.stmts.eventInsert, s.write, eventInsertSQL},
		{&s.stmts.transitionEvent, s.write, transitionEventSQL},
		{&s.stmts.transition, s.write, transitionSQL},
		{&s.stmts.sandboxGet, s.read, sandboxGetSQL},
	} {
		if *p.stmt, err = p.db.PrepareContext(ctx, p.query); err != nil {
			return fmt.Errorf("prepare statement: %w", err)
		}
	}
	return nil
}

// kind turns what the driver reports into the errors of package store.
func kind(err error, what string) error {
	var e *driver.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, sql.ErrNoRows):
		return sandbox.Errorf(sandbox.ErrNotFound, "%s not found", what)
	case errors.As(err, &e) && (e.Code() == sqlite3.SQLITE_CONSTRAINT_UNIQUE || e.Code() == sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY):
		return sandbox.Errorf(sandbox.ErrConflict, "%s exists already", what)
	}
	return fmt.Errorf("access %s: %w", what, err)
}

func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func fromNanos(n int64) time.Time {
	if n == 0 {
		return time.Time{}
	}
	return time.Unix(0, n).UTC()
}
