package store

import (
	"context"
	"fmt"
	"io"
	"time"

	"kraken/proto/blob"
)

// WriteLast appends r where the session stands, as the end of its blob. When the last thing that came was a WriteLast,
// too, which then was cut or not followed by a commit, r is the same bytes again: it takes the place of the earlier
// ones. Write and Resync end that.
func (u *Upload) WriteLast(ctx context.Context, r io.Reader) (n int64, err error) {
	if !u.mu.TryLock() {
		return 0, fmt.Errorf("write upload %s: %w", u.id, ErrBusy)
	}
	defer u.mu.Unlock()
	if u.last != nil && !u.ended {
		if err := u.rewind(*u.last); err != nil {
			return 0, err
		}
	}
	at := u.off.Load()
	u.last = &at
	return u.write(ctx, AtEnd, r)
}

// AwaitIdle waits until nobody writes or commits the session, ErrBusy when that lasts longer than most. Somebody may
// begin right after.
func (u *Upload) AwaitIdle(ctx context.Context, most time.Duration) error {
	for began := time.Now(); !u.mu.TryLock(); {
		if time.Since(began) >= most {
			return fmt.Errorf("upload %s: %w", u.id, ErrBusy)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(10 * time.Millisecond):
		}
	}
	u.mu.Unlock()
	return nil
}

// Resync is for who has been told where the session stands and goes on from there: the next WriteLast appends.
func (u *Upload) Resync() {
	if u.mu.TryLock() { // who writes now sets it anew
		u.last = nil
		u.mu.Unlock()
	}
}

// rewind forgets the bytes from at on; u.mu is held.
func (u *Upload) rewind(at int64) error {
	gone := u.off.Load() - at
	if gone <= 0 {
		return nil
	}
	if err := u.open(); err != nil {
		return err
	}
	defer u.park()
	if err := u.f.Truncate(at); err != nil {
		return fmt.Errorf("begin upload %s again at byte %d: %w", u.id, at, err)
	}
	u.off.Store(at)
	u.s.unchargeSession(u.o, gone)
	u.s.unreserve(gone)
	// A hash can't go back: from the start it begins anew, else the commit reads the file.
	u.sha.Reset()
	u.hashed, u.pieces = 0, nil
	if at == 0 && u.o.Size >= 0 && u.o.Size <= blob.MaxSize && !u.o.NoMetainfo {
		u.pieces = blob.NewPieceHasher(u.o.Size)
	}
	return nil
}
