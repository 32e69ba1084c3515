package buildindex

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"kraken/buildindex/names"
	"kraken/proto/disk"
	"kraken/proto/registry"
)

// A push to a build-index whose disk is full is 507 and not 503: tried again it would fail again, until an operator has
// made room. Reads go on, and deletions, and the outbox, which need little: for them the file system's reserve is kept.

// space is what the file system of the database has left.
func (x *Index) space() (disk.Space, error) { return disk.Of(filepath.Dir(x.cfg.Database)) }

// checkSpace is what readiness says of the disk.
func (x *Index) checkSpace(context.Context) error {
	space, err := x.space()
	if err != nil {
		return err
	}
	return space.Check()
}

// roomForMore returns ErrStorageFull where no more than the file system's reserve is left.
func (x *Index) roomForMore() error {
	err := x.checkSpace(x.Context())
	if full := (*disk.FullError)(nil); errors.As(err, &full) {
		return fmt.Errorf("%w: %w", registry.ErrStorageFull, full)
	}
	return nil // what is not known stops nobody
}

// full returns err as ErrStorageFull, with the file system and its free bytes, where the database found no room.
func (x *Index) full(err error) error {
	if !errors.Is(err, names.ErrFull) {
		return err
	}
	if space, serr := x.space(); serr == nil {
		err = &disk.FullError{Space: space, Err: err}
	}
	return fmt.Errorf("%w: %w", registry.ErrStorageFull, err)
}
