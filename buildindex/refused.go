package buildindex

import (
	"context"
	"fmt"
	"sync"
	"time"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// A change that a client is told was not done must not come true when an origin is heard that has its record, and could
// not be told to forget it. So before the client is told, the refusal is noted in SQL, for later processes, and at the
// origins that answer, for one that has lost SQL. It is dropped once all origins were heard without the record.

const (
	// refusedFor is how long a refusal stays noted at least: a request may yet be under way to an origin.
	refusedFor = 2 * settled
	// maxRefusals bounds how many are noted; what is refused beyond is told as what may yet come.
	maxRefusals = 10_000
)

var errManyRefused = fmt.Errorf("more than %d refused changes may be at origins that don't answer", maxRefusals)

// takeBack takes the records of a change back that is refused, and returns what the client is told: why, or
// ErrTooFewCopies where an origin may keep a record and that it was refused could not be noted.
func (x *Index) takeBack(ctx context.Context, rs []cluster.NameRecord, why error) error {
	var left []names.Refused
	for _, r := range rs {
		if !x.retract(ctx, r) {
			left = append(left, names.Refused{Repository: r.Repository, Key: cluster.NameKey(r), Generation: r.Generation, Since: time.Now().UnixMilli()})
		}
	}
	if len(left) == 0 {
		return why
	}
	if err := x.noteRefused(ctx, left); err != nil {
		x.log.Warn("a refused change may yet come", "repository", rs[0].Repository, "refused", why, "error", err)
		return &registry.RetryError{Err: fmt.Errorf("%w: refused (%v), but an origin that does not answer may keep it: %w", registry.ErrTooFewCopies, why, err), After: time.Second}
	}
	return why
}

// noteRefused notes refusals in SQL, then at the origins that answer.
func (x *Index) noteRefused(ctx context.Context, rs []names.Refused) error {
	noted, err := x.db.Refused(ctx)
	if err != nil {
		return err
	}
	if len(noted)+len(rs) > maxRefusals {
		return errManyRefused
	}
	if err := x.db.Update(ctx, func(tx names.Tx) error { return putRefused(tx, rs) }); err != nil {
		return err
	}
	ctx = transport.WithProgressTimeout(ctx, cluster.Stall)
	var wg sync.WaitGroup
	for _, r := range rs {
		note := x.signer.Sign(cluster.NewRefusal(r.Repository, r.Key, r.Generation, time.Now()))
		for _, o := range x.origins.All() {
			if !o.Answers() {
				continue
			}
			wg.Go(func() {
				if err := o.PutName(ctx, note, x.tenure.id); err != nil {
					x.log.Debug("an origin does not note what was refused", "origin", o.ID, "error", err)
				}
			})
		}
	}
	wg.Wait()
	return nil
}

func putRefused(tx names.Tx, rs []names.Refused) error {
	for _, r := range rs {
		if err := tx.PutRefused(r); err != nil {
			return err
		}
	}
	return nil
}

// takeRefused takes out of a round what was refused, as SQL or an origin of this round has noted, and takes it back
// where it was found, in the next round where that fails. Notes that SQL does not have it takes over: the database may
// be new, or older.
func (x *Index) takeRefused(ctx context.Context, t *round) error {
	noted, err := x.db.Refused(ctx)
	if err != nil {
		return err
	}
	began := time.Now()
	refused := map[recordID]bool{}
	for _, r := range noted {
		refused[recordID{r.Key, r.Generation}] = true
	}
	var fresh []names.Refused
	for _, e := range t.refusals {
		key, _ := e.record.Refuses()
		if id := (recordID{key, e.record.Generation}); !refused[id] {
			refused[id] = true
			fresh = append(fresh, names.Refused{Repository: e.record.Repository, Key: key, Generation: e.record.Generation, Since: began.UnixMilli()})
		}
	}
	if len(refused) == 0 {
		return nil
	}
	if len(fresh) > 0 {
		if err := x.db.Update(ctx, func(tx names.Tx) error { return putRefused(tx, fresh) }); err != nil {
			return err
		}
	}
	adopt, clean := t.adopt, len(t.heard) == len(x.origins.All())
	t.adopt = nil
	ctx = transport.WithProgressTimeout(ctx, cluster.Stall)
	for _, e := range adopt {
		if !refused[idOf(e.record)] {
			t.adopt = append(t.adopt, e)
			continue
		}
		x.log.Info("an origin has a record of a change that was refused: it is taken back", "origin", e.origin, "change", e.record.Change())
		if err := x.origins.Get(e.origin).DeleteName(ctx, x.signer.Deletion(e.record), x.tenure.id); err != nil {
			x.log.Warn("a record of a change that was refused stays at an origin for now", "origin", e.origin, "error", err)
			clean = false
			continue
		}
		x.keepBefore(ctx, e.record)
	}
	if !clean {
		return nil
	}
	return x.dropRefused(ctx, noted, began)
}

// dropRefused forgets refusals that are old enough, when no origin has a record of them any more.
func (x *Index) dropRefused(ctx context.Context, noted []names.Refused, now time.Time) error {
	var old []names.Refused
	var notes []cluster.NameRecord
	for _, r := range noted {
		if now.Sub(time.UnixMilli(r.Since)) >= refusedFor {
			old, notes = append(old, r), append(notes, cluster.NewRefusal(r.Repository, r.Key, r.Generation, now))
		}
	}
	if len(old) == 0 {
		return nil
	}
	x.forgetAll(ctx, notes) // what an origin keeps of these all the same is taken over by the next round
	return x.db.Update(ctx, func(tx names.Tx) error {
		for _, r := range old {
			if err := tx.DropRefused(r.Key, r.Generation); err != nil {
				return err
			}
		}
		return nil
	})
}
