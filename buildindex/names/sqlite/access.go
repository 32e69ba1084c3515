package sqlite

import (
	"context"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
)

// Access implements names.Store.
func (s *Store) Access(ctx context.Context, kind string) (out []names.AccessEntry, err error) {
	rows, err := s.r.QueryContext(ctx, `SELECT name, value, expires FROM access WHERE kind = ? ORDER BY name`, kind)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		e := names.AccessEntry{Kind: kind}
		if err := rows.Scan(&e.Name, &e.Value, &e.Expires); err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, rows.Err()
}

// LayerRepositories implements names.Store.
func (s *Store) LayerRepositories(ctx context.Context, d digest.Digest, last string, n int) ([]string, error) {
	return s.strings(ctx, `SELECT repository FROM layers WHERE digest = ? AND repository > ? ORDER BY repository LIMIT ?`, d, last, n)
}

// PutAccess implements names.Tx.
func (t *transaction) PutAccess(e names.AccessEntry) error {
	_, err := t.exec(`INSERT INTO access (kind, name, value, expires) VALUES (?, ?, ?, ?)
		ON CONFLICT DO UPDATE SET value = excluded.value, expires = excluded.expires`, e.Kind, e.Name, e.Value, e.Expires)
	return err
}

// DeleteAccess implements names.Tx.
func (t *transaction) DeleteAccess(kind, name string) error {
	n, err := t.exec(`DELETE FROM access WHERE kind = ? AND name = ?`, kind, name)
	if err == nil && n == 0 {
		err = names.ErrNotFound
	}
	return err
}

// DropAccess implements names.Tx.
func (t *transaction) DropAccess(before int64) error {
	_, err := t.exec(`DELETE FROM access WHERE expires > 0 AND expires < ?`, before)
	return err
}
