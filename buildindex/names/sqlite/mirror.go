package sqlite

import (
	"context"
	"database/sql"
	"encoding/json"
	"fmt"
	"math"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
)

// MirroredTag implements names.Mirror.
func (s *Store) MirroredTag(ctx context.Context, repo, tag string) (t names.MirroredTag, err error) {
	var ms int64
	err = s.r.QueryRowContext(ctx, `SELECT digest, checked FROM mirrored_tags WHERE repository = ? AND tag = ?`, repo, tag).Scan(&t.Digest, &ms)
	t.Checked = time.UnixMilli(ms)
	return t, notFound(err)
}

// MirroredManifest implements names.Mirror.
func (s *Store) MirroredManifest(ctx context.Context, repo string, d digest.Digest) (names.Manifest, error) {
	m := names.Manifest{Repository: repo, Digest: d}
	row := s.r.QueryRowContext(ctx, `SELECT media_type, artifact_type, subject, bytes FROM mirrored_manifests WHERE repository = ? AND digest = ?`, repo, d)
	return m, notFound(row.Scan(&m.MediaType, &m.ArtifactType, &m.Subject, &m.Bytes))
}

// MirroredLayer implements names.Mirror.
func (s *Store) MirroredLayer(ctx context.Context, repo string, d digest.Digest) (l names.MirroredLayer, err error) {
	err = s.r.QueryRowContext(ctx, `SELECT size, 1 FROM mirrored_proofs WHERE repository = ?1 AND digest = ?2
		UNION ALL SELECT size, 0 FROM mirrored_layers WHERE repository = ?1 AND digest = ?2 LIMIT 1`, repo, d).Scan(&l.Size, &l.Proved)
	return l, notFound(err)
}

// queryBlobHolders is a paging query, which tests see through EXPLAIN.
const queryBlobHolders = `SELECT repository FROM layers WHERE digest = ?1 AND repository > ?2
	UNION SELECT repository FROM manifests WHERE digest = ?1 AND repository > ?2
	UNION SELECT repository FROM mirrored_manifests WHERE digest = ?1 AND repository > ?2
	UNION SELECT repository FROM mirrored_layers WHERE digest = ?1 AND repository > ?2
	UNION SELECT repository FROM mirrored_proofs WHERE digest = ?1 AND repository > ?2 ORDER BY repository LIMIT ?3`

// BlobHolders implements names.Mirror.
func (s *Store) BlobHolders(ctx context.Context, d digest.Digest, last string, n int) ([]string, error) {
	return s.strings(ctx, queryBlobHolders, d, last, n)
}

// MirroredReferrers implements names.Mirror.
func (s *Store) MirroredReferrers(ctx context.Context, repo string, subject digest.Digest) (r names.MirroredReferrers, err error) {
	var ms int64
	var list []byte
	err = s.r.QueryRowContext(ctx, `SELECT descriptors, checked FROM mirrored_referrers WHERE repository = ? AND subject = ?`, repo, subject).Scan(&list, &ms)
	if err != nil {
		return r, notFound(err)
	}
	r.Checked = time.UnixMilli(ms)
	if err := json.Unmarshal(list, &r.Descriptors); err != nil {
		return r, fmt.Errorf("mirrored referrers of %s in %s: %w", subject, repo, err)
	}
	return r, nil
}

// queryMirroredTags is a paging query, which tests see through EXPLAIN.
const queryMirroredTags = `SELECT tag AS name FROM mirrored_tags WHERE repository = ? AND tag > ? ORDER BY tag LIMIT ?`

// MirroredTags implements names.Mirror.
func (s *Store) MirroredTags(ctx context.Context, repo, last string, n int) ([]string, error) {
	return s.page(ctx, queryMirroredTags, repo, last, n)
}

// queryMirroredBytes reads indexes alone, which tests see through EXPLAIN.
const queryMirroredBytes = `SELECT (SELECT ifnull(sum(size), 0) FROM mirrored_manifests INDEXED BY mirrored_by_use)
	+ (SELECT ifnull(sum(size + ?1), 0) FROM mirrored_referrers INDEXED BY mirrored_referrers_by_use)
	+ (SELECT count(*) * ?1 FROM mirrored_proofs INDEXED BY mirrored_proofs_by_use)`

// MirroredBytes implements names.Mirror.
func (s *Store) MirroredBytes(ctx context.Context) (n int64, err error) {
	err = s.r.QueryRowContext(ctx, queryMirroredBytes, names.MirroredRow).Scan(&n)
	return n, err
}

// MirroredUnwritten implements names.Mirror.
func (s *Store) MirroredUnwritten(ctx context.Context, last cluster.Name, n int) ([]cluster.Name, error) {
	rows, err := s.r.QueryContext(ctx, `SELECT m.repository, m.digest FROM mirrored_manifests m
		WHERE (m.repository, m.digest) > (?, ?) AND NOT EXISTS (SELECT 1 FROM manifests o WHERE o.repository = m.repository AND o.digest = m.digest)
		ORDER BY m.repository, m.digest LIMIT ?`, last.Repository, last.Digest, n)
	return pairs(rows, err, func(repo, d string) cluster.Name { return cluster.ManifestName(repo, digest.Digest(d)) })
}

// MirroredTagsUnwritten implements names.Mirror.
func (s *Store) MirroredTagsUnwritten(ctx context.Context, last cluster.Name, n int) ([]cluster.Name, error) {
	rows, err := s.r.QueryContext(ctx, `SELECT m.repository, m.tag FROM mirrored_tags m
		JOIN manifests o ON o.repository = m.repository AND o.digest = m.digest
		LEFT JOIN tags t ON t.repository = m.repository AND t.tag = m.tag
		WHERE (m.repository, m.tag) > (?, ?) AND (t.digest IS NULL OR t.digest <> m.digest) ORDER BY m.repository, m.tag LIMIT ?`, last.Repository, last.Tag, n)
	return pairs(rows, err, cluster.TagName)
}

// pairs reads rows of two texts.
func pairs(rows *sql.Rows, err error, name func(repo, of string) cluster.Name) (out []cluster.Name, _ error) {
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var repo, of string
		if err := rows.Scan(&repo, &of); err != nil {
			return nil, err
		}
		out = append(out, name(repo, of))
	}
	return out, rows.Err()
}

// PutMirroredTag implements names.MirrorTx.
func (t *transaction) PutMirroredTag(repo, tag string, m names.MirroredTag) error {
	_, err := t.exec(`INSERT INTO mirrored_tags (repository, tag, digest, checked) VALUES (?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET digest = excluded.digest, checked = excluded.checked`, repo, tag, m.Digest, m.Checked.UnixMilli())
	return err
}

// DeleteMirroredTag implements names.MirrorTx.
func (t *transaction) DeleteMirroredTag(repo, tag string) error {
	_, err := t.exec(`DELETE FROM mirrored_tags WHERE repository = ? AND tag = ?`, repo, tag)
	return err
}

// PutMirroredManifest implements names.MirrorTx.
func (t *transaction) PutMirroredManifest(m names.Manifest, blobs []names.Member) error {
	_, err := t.exec(`INSERT INTO mirrored_manifests (repository, digest, media_type, artifact_type, subject, bytes, size, used) VALUES (?, ?, ?, ?, ?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET used = max(used, excluded.used)`, m.Repository, m.Digest, m.MediaType, m.ArtifactType, m.Subject, m.Bytes, len(m.Bytes), time.Now().UnixMilli())
	for _, b := range blobs {
		if err != nil {
			break
		}
		_, err = t.exec(`INSERT INTO mirrored_layers (repository, digest, manifest, size) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING`, m.Repository, b.Digest, m.Digest, b.Size)
	}
	return err
}

// ProveMirrored implements names.MirrorTx.
func (t *transaction) ProveMirrored(repo string, b names.Member) error {
	_, err := t.exec(`INSERT INTO mirrored_proofs (repository, digest, size, used) VALUES (?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET size = excluded.size, used = excluded.used`, repo, b.Digest, b.Size, time.Now().UnixMilli())
	return err
}

// UseMirrored implements names.MirrorTx.
func (t *transaction) UseMirrored(repo string, d digest.Digest, at time.Time) error {
	for _, q := range []string{
		`UPDATE mirrored_manifests SET used = max(used, ?) WHERE repository = ? AND digest = ?`,
		`UPDATE mirrored_referrers SET used = max(used, ?) WHERE repository = ? AND subject = ?`,
		`UPDATE mirrored_proofs SET used = max(used, ?) WHERE repository = ? AND digest = ?`,
	} {
		if _, err := t.exec(q, at.UnixMilli(), repo, d); err != nil {
			return err
		}
	}
	return nil
}

// PruneMirrored implements names.MirrorTx.
func (t *transaction) PruneMirrored(n int) (int, error) {
	rows, err := t.tx.QueryContext(t.ctx, `SELECT repository, digest FROM mirrored_manifests ORDER BY used LIMIT ?`, n)
	gone, err := pairs(rows, err, func(repo, d string) cluster.Name { return cluster.ManifestName(repo, digest.Digest(d)) })
	if err != nil {
		return 0, err
	}
	until := int64(math.MaxInt64) // there are fewer manifests: of all else the oldest go
	if len(gone) == n {
		last := gone[n-1]
		row := t.tx.QueryRowContext(t.ctx, `SELECT used FROM mirrored_manifests WHERE repository = ? AND digest = ?`, last.Repository, last.Digest)
		if err := row.Scan(&until); err != nil {
			return 0, err
		}
	}
	for _, m := range gone {
		for _, q := range []string{
			`DELETE FROM mirrored_manifests WHERE repository = ? AND digest = ?`, `DELETE FROM mirrored_tags WHERE repository = ? AND digest = ?`,
			`DELETE FROM mirrored_layers WHERE repository = ? AND manifest = ?`, `DELETE FROM mirrored_referrers WHERE repository = ? AND subject = ?`,
		} {
			if _, err := t.exec(q, m.Repository, m.Digest); err != nil {
				return 0, err
			}
		}
	}
	all := len(gone)
	for _, q := range []string{
		`DELETE FROM mirrored_referrers WHERE (repository, subject) IN (SELECT repository, subject FROM mirrored_referrers WHERE used <= ? ORDER BY used LIMIT ?)`,
		`DELETE FROM mirrored_proofs WHERE (repository, digest) IN (SELECT repository, digest FROM mirrored_proofs WHERE used <= ? ORDER BY used LIMIT ?)`,
	} {
		more, err := t.exec(q, until, n)
		if err != nil {
			return 0, err
		}
		all += int(more)
	}
	return all, nil
}

// PutMirroredReferrers implements names.MirrorTx.
func (t *transaction) PutMirroredReferrers(repo string, subject digest.Digest, r names.MirroredReferrers) error {
	list, err := json.Marshal(r.Descriptors)
	if err != nil {
		return err
	}
	_, err = t.exec(`INSERT INTO mirrored_referrers (repository, subject, descriptors, checked, size, used) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET descriptors = excluded.descriptors, checked = excluded.checked, size = excluded.size, used = max(used, excluded.used)`,
		repo, subject, list, r.Checked.UnixMilli(), len(list), time.Now().UnixMilli())
	return err
}
