// Package sqlite keeps names in a SQLite file. It hides database/sql and knows no policy.
//
// A write is one transaction that takes the file's write lock before it reads (BEGIN IMMEDIATE), so what it reads is
// still so when it commits, whatever other processes do.
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
	"sync"

	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // the driver, pure Go

	"kraken/buildindex/names"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Store is one database. It implements names.Store. Writes go through one connection, reads through a pool; both see
// committed changes only.
type Store struct {
	w, r *sql.DB

	leader sync.Mutex // of the one who writes for all that wait
	mu     sync.Mutex
	queue  []*write
}

var _ names.Store = (*Store)(nil)

// Open opens or creates the SQLite file at path and migrates its schema. A newer schema is refused.
func Open(ctx context.Context, path string) (_ *Store, err error) {
	q := url.Values{"_pragma": {"journal_mode(WAL)", "synchronous(FULL)", "busy_timeout(10000)", "foreign_keys(ON)"}, "_txlock": {"immediate"}}
	dsn := "file:" + path + "?" + q.Encode()
	s := &Store{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("open database %s: %w", path, err), s.Close())
		}
	}()
	// SQLite would make it readable by all; its other files take the mode of this one.
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	if s.w, err = sql.Open("sqlite", dsn); err != nil {
		return nil, err
	}
	s.w.SetMaxOpenConns(1)
	if s.r, err = sql.Open("sqlite", dsn); err != nil {
		return nil, err
	}
	s.r.SetMaxOpenConns(8)
	files, err := fs.Sub(migrations, "migrations")
	if err != nil {
		return nil, err
	}
	p, err := goose.NewProvider(goose.DialectSQLite3, s.w, files)
	if err != nil {
		return nil, err
	}
	have, err := p.GetDBVersion(ctx)
	if err != nil {
		return nil, err
	}
	sources := p.ListSources()
	if know := sources[len(sources)-1].Version; have > know {
		return nil, fmt.Errorf("%w: schema %d, this program knows up to %d: start a newer one", names.ErrNewerSchema, have, know)
	}
	if _, err := p.Up(ctx); err != nil {
		return nil, err
	}
	return s, nil
}

// Close ends the use of the database.
func (s *Store) Close() error {
	var errs []error
	for _, db := range []*sql.DB{s.r, s.w} {
		if db != nil {
			errs = append(errs, db.Close())
		}
	}
	return errors.Join(errs...)
}

// Ping implements names.Store.
func (s *Store) Ping(ctx context.Context) error { return s.r.PingContext(ctx) }

// notFound turns the error of a query without rows into names.ErrNotFound.
func notFound(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return names.ErrNotFound
	}
	return err
}
