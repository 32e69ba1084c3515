package sqlite

import (
	"database/sql"
	"encoding/json"
	"errors"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// version reads the digest and the generation of a row, a zero Version when there is none.
func (t *transaction) version(q string, args ...any) (v names.Version, err error) {
	err = t.tx.QueryRowContext(t.ctx, q, args...).Scan(&v.Digest, &v.Generation)
	if errors.Is(err, sql.ErrNoRows) {
		err = nil
	}
	return v, err
}

func (t *transaction) tag(repo, tag string) (names.Version, error) {
	return t.version(queryTag, repo, tag)
}

func (t *transaction) manifest(repo string, d digest.Digest) (names.Version, error) {
	return t.version(`SELECT digest, generation FROM manifests WHERE repository = ? AND digest = ?`, repo, d)
}

func (t *transaction) layer(repo string, d digest.Digest) (names.Version, error) {
	return t.version(`SELECT digest, generation FROM layers WHERE repository = ? AND digest = ?`, repo, d)
}

// Require implements names.Tx.
func (t *transaction) Require(repo string, ref registry.Reference, c names.Condition) (err error) {
	var now names.Version
	if ref.Tag != "" {
		now, err = t.tag(repo, ref.Tag)
	} else {
		now, err = t.manifest(repo, ref.Digest)
	}
	if err == nil && !c.Holds(now.Digest) {
		err = &names.Conflict{Kind: names.ErrCondition, Repository: repo, Name: ref, Wanted: c, Now: now}
	}
	return err
}

// notDeletedSince returns a *names.Conflict when a name was deleted by this generation or a later one.
func (t *transaction) notDeletedSince(kind cluster.NameKind, repo string, ref registry.Reference, generation int64) error {
	dead, err := t.version(`SELECT '', generation FROM tombstones WHERE repository = ? AND kind = ? AND name = ?`, repo, kind.String(), ref.String())
	if err == nil && dead.Generation > 0 && dead.Generation >= generation {
		err = &names.Conflict{Kind: names.ErrNewer, Repository: repo, Name: ref, Now: dead}
	}
	return err
}

// bury notes the deletion of a name, unless what is there is newer, a *names.Conflict. It returns names.ErrNotFound
// when nothing is there; the deletion is noted all the same.
func (t *transaction) bury(kind cluster.NameKind, repo string, ref registry.Reference, now names.Version, generation int64) error {
	if now.Digest != "" && now.Generation > generation {
		return &names.Conflict{Kind: names.ErrNewer, Repository: repo, Name: ref, Now: now}
	}
	_, err := t.exec(`INSERT INTO tombstones (repository, kind, name, generation) VALUES (?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET generation = max(generation, excluded.generation)`, repo, kind.String(), ref.String(), generation)
	if err == nil && now.Digest == "" {
		err = names.ErrNotFound
	}
	return err
}

// unbury forgets the deletion of a name that is put again: what is there has a higher generation.
func (t *transaction) unbury(kind cluster.NameKind, repo string, ref registry.Reference) error {
	_, err := t.exec(`DELETE FROM tombstones WHERE repository = ? AND kind = ? AND name = ?`, repo, kind.String(), ref.String())
	return err
}

func (t *transaction) repository(repo string) error {
	_, err := t.exec(`INSERT INTO repositories (name) VALUES (?) ON CONFLICT DO NOTHING`, repo)
	return err
}

// PutManifest implements names.Tx.
func (t *transaction) PutManifest(m names.Manifest) error {
	ref := registry.Reference{Digest: m.Digest}
	if err := t.notDeletedSince(cluster.Manifest, m.Repository, ref, m.Generation); err != nil {
		return err
	}
	if err := t.unbury(cluster.Manifest, m.Repository, ref); err != nil {
		return err
	}
	if err := t.repository(m.Repository); err != nil {
		return err
	}
	if _, err := t.exec(`INSERT INTO contents (digest, bytes) VALUES (?, ?) ON CONFLICT DO NOTHING`, m.Digest, m.Bytes); err != nil {
		return err
	}
	_, err := t.exec(`INSERT INTO manifests (repository, digest, media_type, artifact_type, subject, generation) VALUES (?, ?, ?, ?, ?, ?)
		ON CONFLICT (repository, digest) DO UPDATE SET media_type = excluded.media_type, generation = max(generation, excluded.generation)`,
		m.Repository, m.Digest, m.MediaType, m.ArtifactType, m.Subject, m.Generation)
	return err
}

// PutTag implements names.Tx.
func (t *transaction) PutTag(repo, tag string, v names.Version) error {
	ref := registry.Reference{Tag: tag}
	if err := t.notDeletedSince(cluster.Tag, repo, ref, v.Generation); err != nil {
		return err
	}
	now, err := t.tag(repo, tag)
	if err != nil {
		return err
	}
	tie := now.Generation == v.Generation && now.Digest != v.Digest && v.Generation != names.NoGeneration
	if now.Digest != "" && (now.Generation > v.Generation || tie) {
		return &names.Conflict{Kind: names.ErrNewer, Repository: repo, Name: ref, Now: now}
	}
	if err := t.unbury(cluster.Tag, repo, ref); err != nil {
		return err
	}
	_, err = t.exec(`INSERT INTO tags (repository, tag, digest, generation) VALUES (?, ?, ?, ?)
		ON CONFLICT (repository, tag) DO UPDATE SET digest = excluded.digest, generation = excluded.generation`, repo, tag, v.Digest, v.Generation)
	return err
}

// DeleteTag implements names.Tx.
func (t *transaction) DeleteTag(repo, tag string, generation int64) error {
	now, err := t.tag(repo, tag)
	if err != nil {
		return err
	}
	if err := t.bury(cluster.Tag, repo, registry.Reference{Tag: tag}, now, generation); err != nil {
		return err
	}
	_, err = t.exec(`DELETE FROM tags WHERE repository = ? AND tag = ?`, repo, tag)
	return err
}

// DeleteManifest implements names.Tx. The bytes go with the last repository that has the manifest.
func (t *transaction) DeleteManifest(repo string, d digest.Digest, generation int64) (tags []names.Tagged, err error) {
	now, err := t.manifest(repo, d)
	if err != nil {
		return nil, err
	}
	if err := t.bury(cluster.Manifest, repo, registry.Reference{Digest: d}, now, generation); err != nil {
		return nil, err
	}
	if tags, err = t.deleteTagsOf(repo, d); err != nil {
		return nil, err
	}
	if _, err = t.exec(`DELETE FROM manifests WHERE repository = ? AND digest = ?`, repo, d); err != nil {
		return nil, err
	}
	if _, err = t.exec(`DELETE FROM contents WHERE digest = ?1 AND NOT EXISTS (SELECT 1 FROM manifests WHERE digest = ?1)`, d); err != nil {
		return nil, err
	}
	return tags, t.emptied(repo)
}

// deleteTagsOf removes the tags that name a manifest, and returns them. What is newer than such a tag was may set it
// again, also when it is older than the deletion of the manifest: it names another one.
func (t *transaction) deleteTagsOf(repo string, d digest.Digest) (tags []names.Tagged, err error) {
	rows, err := t.tx.QueryContext(t.ctx, `SELECT tag, generation FROM tags WHERE repository = ? AND digest = ?`, repo, d)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var was names.Tagged
		if err := rows.Scan(&was.Tag, &was.Generation); err != nil {
			return nil, err
		}
		tags = append(tags, was)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	for _, was := range tags {
		if err := t.DeleteTag(repo, was.Tag, was.Generation); err != nil {
			return nil, err
		}
	}
	return tags, nil
}

// emptied ends a repository that has neither a manifest nor a blob any more.
func (t *transaction) emptied(repo string) error {
	_, err := t.exec(`DELETE FROM repositories WHERE name = ?1 AND NOT EXISTS (SELECT 1 FROM manifests WHERE repository = ?1) AND NOT EXISTS (SELECT 1 FROM layers WHERE repository = ?1)`, repo)
	return err
}

// PutLayer implements names.Tx.
func (t *transaction) PutLayer(repo string, d digest.Digest, size, generation int64) error {
	ref := registry.Reference{Digest: d}
	if err := t.notDeletedSince(cluster.Membership, repo, ref, generation); err != nil {
		return err
	}
	if err := t.unbury(cluster.Membership, repo, ref); err != nil {
		return err
	}
	if err := t.repository(repo); err != nil {
		return err
	}
	_, err := t.exec(`INSERT INTO layers (repository, digest, size, generation) VALUES (?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET generation = excluded.generation WHERE excluded.generation > generation`, repo, d, size, generation)
	return err
}

// DeleteLayer implements names.Tx.
func (t *transaction) DeleteLayer(repo string, d digest.Digest, generation int64) error {
	now, err := t.layer(repo, d)
	if err != nil {
		return err
	}
	if err := t.bury(cluster.Membership, repo, registry.Reference{Digest: d}, now, generation); err != nil {
		return err
	}
	if _, err := t.exec(`DELETE FROM layers WHERE repository = ? AND digest = ?`, repo, d); err != nil {
		return err
	}
	return t.emptied(repo)
}

// Enqueue implements names.Tx. A manifest's bytes are in a table of their own, and its signature is at the origins.
func (t *transaction) Enqueue(bucket string, r cluster.NameRecord) error {
	r.Bytes, r.Signature = nil, nil
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if _, err = t.exec(`INSERT INTO outbox (bucket, record, generation, key) VALUES (?, ?, ?, ?)`, bucket, b, r.Generation, cluster.NameKey(r)); err != nil {
		return err
	}
	_, err = t.exec(`UPDATE last_generation SET generation = max(generation + 1, ?)`, r.Generation)
	return err
}

// SetBucket implements names.Tx.
func (t *transaction) SetBucket(id int64, bucket string) error {
	_, err := t.exec(`UPDATE outbox SET bucket = ? WHERE id = ?`, bucket, id)
	return err
}

// Done implements names.Tx.
func (t *transaction) Done(id int64) error {
	_, err := t.exec(`DELETE FROM outbox WHERE id = ?`, id)
	return err
}

// RaiseGeneration implements names.Tx.
func (t *transaction) RaiseGeneration(n int64) error {
	_, err := t.exec(`UPDATE last_generation SET generation = max(generation, ?)`, n)
	return err
}

// SetMeta implements names.Tx.
func (t *transaction) SetMeta(key, v string) error {
	_, err := t.exec(`INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`, key, v)
	return err
}
