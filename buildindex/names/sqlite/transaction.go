package sqlite

import (
	"context"
	"database/sql"
	"errors"
	"fmt"

	driver "modernc.org/sqlite"

	"kraken/buildindex/names"
)

// transaction is one transaction of writes. It implements names.Tx.
type transaction struct {
	ctx context.Context
	tx  *sql.Tx
}

// write is one caller's part of a transaction.
type write struct {
	f    func(names.Tx) error
	done bool
	err  error
}

// errLost is a write whose transaction ended in a panic.
var errLost = errors.New("the transaction was given up")

// Update implements names.Store. Callers that come while the disk is waited for share the next transaction, each behind
// a savepoint of its own: one that fails takes nothing of the others with it.
func (s *Store) Update(ctx context.Context, f func(names.Tx) error) error {
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
	return full(w.err)
}

// Codes of SQLite for a file system without room: of its files, and of the memory that its processes share.
const (
	codeFull    = 13         // SQLITE_FULL
	codeShmSize = 10 | 19<<8 // SQLITE_IOERR_SHMSIZE
)

// full returns err as names.ErrFull where it says that there is no room.
func full(err error) error {
	var e *driver.Error
	if errors.As(err, &e) && (e.Code() == codeFull || e.Code() == codeShmSize) {
		return fmt.Errorf("%w: %w", names.ErrFull, err)
	}
	return err
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
	t := &transaction{ctx, tx}
	results := make([]error, len(batch))
	for i, w := range batch {
		if len(batch) == 1 {
			results[i] = w.f(t)
		} else if results[i], err = t.savepoint(w.f); err != nil {
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

// savepoint runs f and undoes what it did when it fails. fatal is an error after which the transaction can't go on.
func (t *transaction) savepoint(f func(names.Tx) error) (failed, fatal error) {
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

func (t *transaction) exec(q string, args ...any) (int64, error) {
	r, err := t.tx.ExecContext(t.ctx, q, args...)
	if err != nil {
		return 0, err
	}
	return r.RowsAffected()
}
