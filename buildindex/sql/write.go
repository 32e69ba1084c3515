package sql

import (
	"context"
	"database/sql"
	"encoding/json"
	"errors"

	"github.com/opencontainers/go-digest"

	"kraken/proto/registry"
)

// Tx is one transaction of writes.
type Tx struct {
	ctx context.Context
	tx  *sql.Tx
}

// write is one caller's part of a transaction.
type write struct {
	f    func(*Tx) error
	done bool
	err  error
}

// errLost is a write whose transaction ended in a panic.
var errLost = errors.New("the transaction was given up")

// Update runs f in a transaction, which is durable when Update returns nil. Callers that come while the disk is waited for share the next
// transaction, each behind a savepoint of its own: one that fails takes nothing of the others with it. What has begun is finished also
// when ctx ends meanwhile.
func (s *Store) Update(ctx context.Context, f func(*Tx) error) error {
	if err := context.Cause(ctx); err != nil {
		return err
	}
	w := &write{f: f, err: errLost}
	s.mu.Lock()
	s.queue = append(s.queue, w)
	s.mu.Unlock()
	s.leader.Lock()
	defer s.leader.Unlock()
	if !w.done { // else somebody who led before took it along
		s.mu.Lock()
		batch := s.queue
		s.queue = nil
		s.mu.Unlock()
		defer func() { // also in a panic: nobody is left behind
			for _, w := range batch {
				w.done = true
			}
		}()
		s.commit(context.WithoutCancel(ctx), batch)
	}
	return w.err
}

// commit runs a batch in one transaction.
func (s *Store) commit(ctx context.Context, batch []*write) {
	fail := func(err error) {
		for _, w := range batch {
			w.err = err
		}
	}
	tx, err := s.w.BeginTx(ctx, nil)
	if err != nil {
		fail(err)
		return
	}
	over := false
	defer func() {
		if !over {
			_ = tx.Rollback() // what went wrong is known already
		}
	}()
	t := &Tx{ctx, tx}
	results := make([]error, len(batch))
	for i, w := range batch {
		if results[i], err = t.savepoint(w.f, len(batch) == 1); err != nil {
			fail(err)
			return
		}
	}
	if len(batch) == 1 && results[0] != nil {
		batch[0].err = results[0]
		return
	}
	over = true
	if err := tx.Commit(); err != nil {
		fail(err)
		return
	}
	for i, w := range batch {
		w.err = results[i]
	}
}

// savepoint runs f; what it did before it failed is undone. fatal says that the transaction can't go on.
func (t *Tx) savepoint(f func(*Tx) error, alone bool) (failed, fatal error) {
	if alone {
		return f(t), nil
	}
	if _, err := t.exec(`SAVEPOINT part`); err != nil {
		return nil, err
	}
	if failed = f(t); failed != nil {
		if _, err := t.exec(`ROLLBACK TO part`); err != nil {
			return failed, errors.Join(failed, err)
		}
	}
	if _, err := t.exec(`RELEASE part`); err != nil {
		return failed, err
	}
	return failed, nil
}

func (t *Tx) exec(q string, args ...any) (int64, error) {
	r, err := t.tx.ExecContext(t.ctx, q, args...)
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}

func (t *Tx) repository(repo string) error {
	_, err := t.exec(`INSERT INTO repositories (name) VALUES (?) ON CONFLICT DO NOTHING`, repo)
	return err
}

// PutManifest stores a manifest and its bytes.
func (t *Tx) PutManifest(m Manifest) error {
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

// PutTag points a tag at a digest, ErrNewerTag when a later generation has pointed it elsewhere.
func (t *Tx) PutTag(repo, tag string, d digest.Digest, generation int64) error {
	n, err := t.exec(`INSERT INTO tags (repository, tag, digest, generation) VALUES (?, ?, ?, ?)
		ON CONFLICT (repository, tag) DO UPDATE SET digest = excluded.digest, generation = excluded.generation WHERE excluded.generation >= generation`,
		repo, tag, d, generation)
	if err == nil && n == 0 {
		err = ErrNewerTag
	}
	return err
}

// DeleteTag removes a tag of this generation or an older one, ErrNotFound when there is none.
func (t *Tx) DeleteTag(repo, tag string, generation int64) error {
	return t.gone(`DELETE FROM tags WHERE repository = ? AND tag = ? AND generation <= ?`, repo, tag, generation)
}

func (t *Tx) gone(q string, args ...any) error {
	n, err := t.exec(q, args...)
	if err == nil && n == 0 {
		err = ErrNotFound
	}
	return err
}

// DeleteManifest removes a manifest and its tags, and returns these. Its bytes go with the last repository that has it.
func (t *Tx) DeleteManifest(repo string, d digest.Digest, generation int64) (tags []string, err error) {
	if err := t.gone(`DELETE FROM manifests WHERE repository = ? AND digest = ? AND generation <= ?`, repo, d, generation); err != nil {
		return nil, err
	}
	rows, err := t.tx.QueryContext(t.ctx, `DELETE FROM tags WHERE repository = ? AND digest = ? RETURNING tag`, repo, d)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var tag string
		if err := rows.Scan(&tag); err != nil {
			return nil, err
		}
		tags = append(tags, tag)
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	if _, err = t.exec(`DELETE FROM contents WHERE digest = ? AND NOT EXISTS (SELECT 1 FROM manifests WHERE digest = ?)`, d, d); err != nil {
		return tags, err
	}
	return tags, t.emptied(repo)
}

// emptied ends a repository that has neither a manifest nor a blob any more.
func (t *Tx) emptied(repo string) error {
	_, err := t.exec(`DELETE FROM repositories WHERE name = ?1 AND NOT EXISTS (SELECT 1 FROM manifests WHERE repository = ?1) AND NOT EXISTS (SELECT 1 FROM layers WHERE repository = ?1)`, repo)
	return err
}

// PutLayer makes a blob a member of a repository.
func (t *Tx) PutLayer(repo string, d digest.Digest, size int64) error {
	if err := t.repository(repo); err != nil {
		return err
	}
	_, err := t.exec(`INSERT INTO layers (repository, digest, size) VALUES (?, ?, ?) ON CONFLICT DO NOTHING`, repo, d, size)
	return err
}

// DeleteLayer ends a membership, ErrNotFound when there is none.
func (t *Tx) DeleteLayer(repo string, d digest.Digest) error {
	if err := t.gone(`DELETE FROM layers WHERE repository = ? AND digest = ?`, repo, d); err != nil {
		return err
	}
	return t.emptied(repo)
}

// Enqueue adds a change for the bucket. A manifest's bytes are in its own table, and are not kept a second time.
func (t *Tx) Enqueue(r registry.NameRecord) error {
	r.Bytes, r.Signature = nil, nil
	b, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if _, err = t.exec(`INSERT INTO outbox (record, generation) VALUES (?, ?)`, b, r.Generation); err != nil {
		return err
	}
	return t.RaiseGeneration(r.Generation)
}

// RaiseGeneration says that changes up to this generation are known.
func (t *Tx) RaiseGeneration(n int64) error {
	_, err := t.exec(`UPDATE last_generation SET generation = max(generation, ?)`, n)
	return err
}

// SetMeta writes a setting.
func (t *Tx) SetMeta(key, v string) error {
	_, err := t.exec(`INSERT INTO meta (key, value) VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET value = excluded.value`, key, v)
	return err
}
