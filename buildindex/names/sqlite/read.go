package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// Meta implements names.Store.
func (s *Store) Meta(ctx context.Context, key string) (v string, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT value FROM meta WHERE key = ?`, key).Scan(&v)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return v, err
}

// State implements names.Store.
func (s *Store) State(ctx context.Context) (st names.State, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT generation, (SELECT count(*) FROM outbox) FROM last_generation`).Scan(&st.LastGeneration, &st.OutboxRows)
	return st, err
}

// Manifest implements names.Store.
func (s *Store) Manifest(ctx context.Context, repo string, ref registry.Reference) (names.Manifest, error) {
	where, name := `WHERE m.repository = ? AND m.digest = ?`, ref.Digest.String()
	if ref.Tag != "" {
		where, name = `JOIN tags t ON t.repository = m.repository AND t.digest = m.digest WHERE t.repository = ? AND t.tag = ?`, ref.Tag
	}
	m := names.Manifest{Repository: repo}
	row := s.r.QueryRowContext(ctx, `SELECT m.digest, m.media_type, m.artifact_type, m.subject, m.generation, c.bytes
		FROM manifests m JOIN contents c ON c.digest = m.digest `+where, repo, name)
	err := row.Scan(&m.Digest, &m.MediaType, &m.ArtifactType, &m.Subject, &m.Generation, &m.Bytes)
	return m, notFound(err)
}

// StatManifest implements names.Store.
func (s *Store) StatManifest(ctx context.Context, repo string, d digest.Digest) (names.Manifest, error) {
	m := names.Manifest{Repository: repo, Digest: d}
	row := s.r.QueryRowContext(ctx, `SELECT media_type, artifact_type, subject, generation FROM manifests WHERE repository = ? AND digest = ?`, repo, d)
	return m, notFound(row.Scan(&m.MediaType, &m.ArtifactType, &m.Subject, &m.Generation))
}

// queryTag finds what a tag is.
const queryTag = `SELECT digest, generation FROM tags WHERE repository = ? AND tag = ?`

// Tag implements names.Store.
func (s *Store) Tag(ctx context.Context, repo, tag string) (v names.Version, err error) {
	err = s.r.QueryRowContext(ctx, queryTag, repo, tag).Scan(&v.Digest, &v.Generation)
	return v, notFound(err)
}

// Deleted implements names.Store.
func (s *Store) Deleted(ctx context.Context, n cluster.Name) (generation int64, err error) {
	ref := registry.Reference{Tag: n.Tag, Digest: n.Digest}
	err = s.r.QueryRowContext(ctx, `SELECT generation FROM tombstones WHERE repository = ? AND kind = ? AND name = ?`, n.Repository, n.Kind.String(), ref.String()).Scan(&generation)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return generation, err
}

// Layer implements names.Store.
func (s *Store) Layer(ctx context.Context, repo string, d digest.Digest) (l names.Layer, err error) {
	if repo == "" {
		err = s.r.QueryRowContext(ctx, `SELECT size, generation FROM layers WHERE digest = ? LIMIT 1`, d).Scan(&l.Size, &l.Generation)
	} else {
		err = s.r.QueryRowContext(ctx, `SELECT size, generation FROM layers WHERE repository = ? AND digest = ?`, repo, d).Scan(&l.Size, &l.Generation)
	}
	return l, notFound(err)
}

// Layers implements names.Store.
func (s *Store) Layers(ctx context.Context, repo string, last digest.Digest, n int) (out []names.Member, err error) {
	rows, err := s.r.QueryContext(ctx, queryLayers, repo, last, n)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var m names.Member
		if err := rows.Scan(&m.Digest, &m.Size); err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, rows.Err()
}

// The paging queries, which tests see through EXPLAIN.
const (
	queryQueuedBefore = `SELECT id, bucket, record FROM outbox WHERE key = ? AND generation < ? ORDER BY generation DESC LIMIT 1`
	queryOutbox       = `SELECT id, bucket, record FROM outbox WHERE bucket = ? AND id > ? ORDER BY id LIMIT ?`
	queryTags         = `SELECT tag AS name FROM tags WHERE repository = ? AND tag > ? ORDER BY tag LIMIT ?`
	queryLayers       = `SELECT digest, size FROM layers WHERE repository = ? AND digest > ? ORDER BY digest LIMIT ?`
	queryRepositories = `SELECT name FROM repositories WHERE name > ? ORDER BY name LIMIT ?`
	queryReferrers    = `SELECT m.digest, m.media_type, m.artifact_type, c.bytes FROM manifests m JOIN contents c ON c.digest = m.digest WHERE m.repository = ? AND m.subject = ? AND m.subject <> '' AND m.digest > ? ORDER BY m.digest LIMIT ?`
)

// Tags implements names.Store.
func (s *Store) Tags(ctx context.Context, repo, last string, n int) ([]string, error) {
	var exists bool
	if err := s.r.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM repositories WHERE name = ?)`, repo).Scan(&exists); err != nil {
		return nil, err
	}
	if !exists {
		return nil, names.ErrNotFound
	}
	return s.page(ctx, queryTags, repo, last, n)
}

// TagsOf implements names.Store.
func (s *Store) TagsOf(ctx context.Context, repo string, d digest.Digest) ([]string, error) {
	return s.strings(ctx, `SELECT tag FROM tags WHERE repository = ? AND digest = ?`, repo, d)
}

// Repositories implements names.Store.
func (s *Store) Repositories(ctx context.Context, last string, n int) ([]string, error) {
	return s.page(ctx, queryRepositories, last, n)
}

// page reads a paging query's names as one value, in less than half the time of a row each: a page can have thousands.
// No name has a line break in it.
func (s *Store) page(ctx context.Context, q string, args ...any) ([]string, error) {
	var all sql.NullString
	if err := s.r.QueryRowContext(ctx, `SELECT group_concat(name, char(10)) FROM (`+q+`)`, args...).Scan(&all); err != nil || !all.Valid {
		return nil, err
	}
	page := strings.Split(all.String, "\n")
	if !slices.IsSorted(page) { // it follows the query, but SQLite doesn't promise that
		slices.Sort(page)
	}
	return page, nil
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

// Referrers implements names.Store.
func (s *Store) Referrers(ctx context.Context, repo string, d digest.Digest, last string, n int) (out []names.Manifest, err error) {
	rows, err := s.r.QueryContext(ctx, queryReferrers, repo, d, last, n)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		m := names.Manifest{Repository: repo, Subject: d}
		if err := rows.Scan(&m.Digest, &m.MediaType, &m.ArtifactType, &m.Bytes); err != nil {
			return nil, err
		}
		out = append(out, m)
	}
	return out, rows.Err()
}

// Queued implements names.Store.
func (s *Store) Queued(ctx context.Context, generation int64) ([]names.OutboxRow, error) {
	return s.outbox(ctx, `SELECT id, bucket, record FROM outbox WHERE generation = ? ORDER BY id`, generation)
}

// Outbox implements names.Store.
func (s *Store) Outbox(ctx context.Context, bucket string, after int64, n int) ([]names.OutboxRow, error) {
	if bucket == names.AllBuckets {
		return s.outbox(ctx, `SELECT id, bucket, record FROM outbox WHERE id > ? ORDER BY id LIMIT ?`, after, n)
	}
	return s.outbox(ctx, queryOutbox, bucket, after, n)
}

// QueuedBefore implements names.Store.
func (s *Store) QueuedBefore(ctx context.Context, key string, generation int64) (names.OutboxRow, error) {
	rows, err := s.outbox(ctx, queryQueuedBefore, key, generation)
	if err == nil && len(rows) == 0 {
		err = names.ErrNotFound
	}
	if err != nil {
		return names.OutboxRow{}, err
	}
	return rows[0], nil
}

func (s *Store) outbox(ctx context.Context, query string, args ...any) (out []names.OutboxRow, err error) {
	rows, err := s.r.QueryContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var row names.OutboxRow
		var b []byte
		if err := rows.Scan(&row.ID, &row.Bucket, &b); err != nil {
			return nil, err
		}
		if err := json.Unmarshal(b, &row.Record); err != nil {
			row.Err = fmt.Errorf("outbox row %d: %w", row.ID, err)
		}
		out = append(out, row)
	}
	return out, rows.Err()
}
