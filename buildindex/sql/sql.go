// Package sql keeps names in a database: repositories, manifests, tags, memberships, and the outbox of changes that the bucket
// lacks. It hides database/sql and knows no policy.
package sql

import (
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/opencontainers/go-digest"
	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // the driver, pure Go

	"kraken/proto/registry"
)

//go:embed migrations/*.sql
var migrations embed.FS

// Errors of this package.
var (
	ErrNotFound    = errors.New("not in the database")
	ErrNewerSchema = errors.New("database was written by a newer version")
	ErrNewerTag    = errors.New("the tag was changed by a later generation")
)

// Store is one database. Writes go through one connection, reads through a pool; both see committed changes only.
type Store struct {
	w, r *sql.DB

	leader sync.Mutex // of the one who writes for all that wait
	mu     sync.Mutex
	queue  []*write
}

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
		return nil, fmt.Errorf("%w: schema %d, this program knows up to %d: start a newer one", ErrNewerSchema, have, know)
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

// Ping says whether the database answers.
func (s *Store) Ping(ctx context.Context) error { return s.r.PingContext(ctx) }

func none(err error) error {
	if errors.Is(err, sql.ErrNoRows) {
		return ErrNotFound
	}
	return err
}

// Meta reads a setting, empty when it is not set.
func (s *Store) Meta(ctx context.Context, key string) (v string, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT value FROM meta WHERE key = ?`, key).Scan(&v)
	if errors.Is(none(err), ErrNotFound) {
		err = nil
	}
	return v, err
}

// LastGeneration is the highest generation of a change that was committed.
func (s *Store) LastGeneration(ctx context.Context) (n int64, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT generation FROM last_generation`).Scan(&n)
	return n, err
}

// Queued returns the changes of this generation that are in the outbox. Deleting a manifest makes one for each of its tags, too.
func (s *Store) Queued(ctx context.Context, generation int64) ([]OutboxRow, error) {
	return s.outbox(ctx, `SELECT id, record FROM outbox WHERE generation = ? ORDER BY id`, generation)
}

// Manifest is a row of manifests, with its bytes.
type Manifest struct {
	Repository   string
	Digest       digest.Digest
	MediaType    string
	ArtifactType string
	Subject      digest.Digest
	Generation   int64
	Bytes        []byte
}

const selectManifest = `SELECT m.digest, m.media_type, c.bytes FROM manifests m JOIN contents c ON c.digest = m.digest `

// ManifestByDigest reads a manifest of a repository.
func (s *Store) ManifestByDigest(ctx context.Context, repo string, d digest.Digest) (Manifest, error) {
	m := Manifest{Repository: repo}
	err := s.r.QueryRowContext(ctx, selectManifest+`WHERE m.repository = ? AND m.digest = ?`, repo, d).Scan(&m.Digest, &m.MediaType, &m.Bytes)
	return m, none(err)
}

// ManifestByTag reads the manifest that a tag names.
func (s *Store) ManifestByTag(ctx context.Context, repo, tag string) (Manifest, error) {
	m := Manifest{Repository: repo}
	err := s.r.QueryRowContext(ctx, selectManifest+`JOIN tags t ON t.repository = m.repository AND t.digest = m.digest WHERE t.repository = ? AND t.tag = ?`, repo, tag).Scan(&m.Digest, &m.MediaType, &m.Bytes)
	return m, none(err)
}

// Tag is the digest and generation of a tag.
func (s *Store) Tag(ctx context.Context, repo, tag string) (d digest.Digest, generation int64, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT digest, generation FROM tags WHERE repository = ? AND tag = ?`, repo, tag).Scan(&d, &generation)
	return d, generation, none(err)
}

// HasManifest says whether a repository has a manifest.
func (s *Store) HasManifest(ctx context.Context, repo string, d digest.Digest) (ok bool, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM manifests WHERE repository = ? AND digest = ?)`, repo, d).Scan(&ok)
	return ok, err
}

// Subject is the subject of a manifest, empty for none.
func (s *Store) Subject(ctx context.Context, repo string, d digest.Digest) (subject digest.Digest, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT subject FROM manifests WHERE repository = ? AND digest = ?`, repo, d).Scan(&subject)
	return subject, none(err)
}

// Layer is the size of a member of a repository.
func (s *Store) Layer(ctx context.Context, repo string, d digest.Digest) (size int64, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT size FROM layers WHERE repository = ? AND digest = ?`, repo, d).Scan(&size)
	return size, none(err)
}

// AnyLayer finds a repository that has a blob.
func (s *Store) AnyLayer(ctx context.Context, d digest.Digest) (size int64, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT size FROM layers WHERE digest = ? LIMIT 1`, d).Scan(&size)
	return size, none(err)
}

// HasRepository says whether a repository exists.
func (s *Store) HasRepository(ctx context.Context, repo string) (ok bool, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM repositories WHERE name = ?)`, repo).Scan(&ok)
	return ok, err
}

// The paging queries, which tests see through EXPLAIN.
const (
	queryTags         = `SELECT tag AS name FROM tags WHERE repository = ? AND tag > ? ORDER BY tag LIMIT ?`
	queryRepositories = `SELECT name FROM repositories WHERE name > ? ORDER BY name LIMIT ?`
	queryReferrers    = `SELECT m.digest, m.media_type, m.artifact_type, c.bytes FROM manifests m JOIN contents c ON c.digest = m.digest WHERE m.repository = ? AND m.subject = ? AND m.subject <> '' AND m.digest > ? ORDER BY m.digest LIMIT ?`
)

// Tags is up to n tags after last.
func (s *Store) Tags(ctx context.Context, repo, last string, n int) ([]string, error) {
	return s.page(ctx, queryTags, repo, last, n)
}

// TagsOf is the tags that name a manifest.
func (s *Store) TagsOf(ctx context.Context, repo string, d digest.Digest) ([]string, error) {
	return s.strings(ctx, `SELECT tag FROM tags WHERE repository = ? AND digest = ?`, repo, d)
}

// Repositories is up to n repositories after last.
func (s *Store) Repositories(ctx context.Context, last string, n int) ([]string, error) {
	return s.page(ctx, queryRepositories, last, n)
}

// page reads a paging query's names as one value, in less than half the time of a row each: a page can have thousands. No name has a line
// break in it.
func (s *Store) page(ctx context.Context, q string, args ...any) ([]string, error) {
	var all sql.NullString
	if err := s.r.QueryRowContext(ctx, `SELECT group_concat(name, char(10)) FROM (`+q+`)`, args...).Scan(&all); err != nil || !all.Valid {
		return nil, err
	}
	names := strings.Split(all.String, "\n")
	if !slices.IsSorted(names) { // it follows the query, but SQLite doesn't promise that
		slices.Sort(names)
	}
	return names, nil
}

func (s *Store) strings(ctx context.Context, q string, args ...any) (out []string, err error) {
	rows, err := s.r.QueryContext(ctx, q, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var v string
		if err := rows.Scan(&v); err != nil {
			return nil, err
		}
		out = append(out, v)
	}
	return out, rows.Err()
}

// Referrers is up to n manifests after last whose subject is d.
func (s *Store) Referrers(ctx context.Context, repo string, d digest.Digest, last string, n int) (out []Manifest, err error) {
	rows, err := s.r.QueryContext(ctx, queryReferrers, repo, d, last, n)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		m := Manifest{Repository: repo, Subject: d}
		if err := rows.Scan(&m.Digest, &m.MediaType, &m.ArtifactType, &m.Bytes); err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, rows.Err()
}

// OutboxRow is a change that the bucket lacks. Err is set for a row that can't be read.
type OutboxRow struct {
	ID     int64
	Record registry.NameRecord
	Err    error
}

// Outbox is up to n rows after id, oldest first.
func (s *Store) Outbox(ctx context.Context, after int64, n int) ([]OutboxRow, error) {
	return s.outbox(ctx, `SELECT id, record FROM outbox WHERE id > ? ORDER BY id LIMIT ?`, after, n)
}

func (s *Store) outbox(ctx context.Context, query string, args ...any) (out []OutboxRow, err error) {
	rows, err := s.r.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var row OutboxRow
		var b []byte
		if err := rows.Scan(&row.ID, &b); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(b, &row.Record); err != nil {
			row.Err = fmt.Errorf("outbox row %d: %w", row.ID, err)
		}
		out = append(out, row)
	}
	return out, rows.Err()
}

// OutboxLen is the number of changes that the bucket lacks.
func (s *Store) OutboxLen(ctx context.Context) (n int, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT count(*) FROM outbox`).Scan(&n)
	return n, err
}

// Done removes outbox rows.
func (s *Store) Done(ctx context.Context, ids ...int64) error {
	return s.Update(ctx, func(tx *Tx) error {
		for _, id := range ids {
			if _, err := tx.exec(`DELETE FROM outbox WHERE id = ?`, id); err != nil {
				return err
			}
		}
		return nil
	})
}
