package sqlite

import (
	"context"

	"kraken/buildindex/names"
)

// Refused implements names.Store.
func (s *Store) Refused(ctx context.Context) (out []names.Refused, err error) {
	rows, err := s.r.QueryContext(ctx, `SELECT repository, key, generation, since FROM refused ORDER BY generation, key`)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	for rows.Next() {
		var r names.Refused
		if err := rows.Scan(&r.Repository, &r.Key, &r.Generation, &r.Since); err != nil {
			return nil, err
		}
		out = append(out, r)
	}
	return out, rows.Err()
}

// PutRefused implements names.Tx.
func (t *transaction) PutRefused(r names.Refused) error {
	_, err := t.exec(`INSERT INTO refused (repository, key, generation, since) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING`, r.Repository, r.Key, r.Generation, r.Since)
	return err
}

// DropRefused implements names.Tx.
func (t *transaction) DropRefused(key string, generation int64) error {
	_, err := t.exec(`DELETE FROM refused WHERE key = ? AND generation = ?`, key, generation)
	return err
}
