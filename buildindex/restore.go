package buildindex

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/proto/transport"
)

const metaRestored = "restored" // set once SQL has what the bucket and enough origins know

const (
	reconcileEvery = time.Minute
	restoreMin     = 200 * time.Millisecond
	restoreMax     = 5 * time.Second // between tries of a restoration
)

// restore makes SQL know what the buckets and the records that origins keep say, compares SQL with these records now
// and then, and hears an origin that was away when it is back, until ctx is done. None of the three waits for another:
// a bucket may take hours, and the list of an origin minutes.
func (x *Index) restore(ctx context.Context) error {
	select {
	case <-x.tenure.begun:
	case <-ctx.Done():
		return nil
	}
	var wg sync.WaitGroup
	wg.Go(func() { x.filling(ctx) })
	wg.Go(func() { x.looking(ctx) })
	wg.Go(func() { x.hearingLate(ctx) })
	wg.Wait()
	return nil
}

// filling restores until SQL has all.
func (x *Index) filling(ctx context.Context) {
	for wait := restoreMin; ; wait = min(2*wait, restoreMax) {
		err := x.fill(ctx)
		x.unknown.report(ctx, x, "fill", err)
		if err == nil || !role.Pause(ctx, wait) {
			return
		}
	}
}

// looking compares SQL with what all origins keep, each minute once enough were heard.
func (x *Index) looking(ctx context.Context) {
	select {
	case <-x.heardOrigins:
	case <-ctx.Done():
		return
	}
	for {
		x.unknown.report(ctx, x, "look", x.reconcile(ctx, x.origins.All()))
		timer := time.NewTimer(reconcileEvery)
		select {
		case <-ctx.Done():
		case <-x.lookSoon:
		case <-timer.C:
		}
		timer.Stop()
		if ctx.Err() != nil {
			return
		}
	}
}

// hearingLate hears origins that enough others were heard before, each for itself as soon as it answers.
func (x *Index) hearingLate(ctx context.Context) {
	var wg sync.WaitGroup
	defer wg.Wait()
	var hearing sync.Map // ids
	for {
		select {
		case <-ctx.Done():
			return
		case <-x.hearSoon:
		}
		for _, o := range x.origins.All() {
			if !x.heard() || x.hasHeard(o) { // fill sees to the first
				continue
			}
			if _, busy := hearing.LoadOrStore(o.ID, true); busy {
				continue
			}
			wg.Go(func() {
				defer hearing.Delete(o.ID)
				err := x.reconcile(ctx, []*cluster.Origin{o})
				x.unknown.report(ctx, x, "origin "+o.ID, err)
				if err == nil && !x.counted.Load() {
					notify(x.lookSoon)
				}
			})
		}
	}
}

// unknown is why SQL may not have all that buckets and origins keep, by what was tried. It is safe for concurrent use.
type unknown struct {
	mu   sync.Mutex
	errs map[string]error // of the last tries
}

// report notes how a try has ended. It is logged when there is an error, once, and when there is none any more.
func (u *unknown) report(ctx context.Context, x *Index, what string, err error) {
	if ctx.Err() != nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	before := len(u.errs)
	if err == nil {
		delete(u.errs, what)
	} else if u.errs == nil {
		u.errs = map[string]error{what: err}
	} else {
		u.errs[what] = err
	}
	switch {
	case before == 0 && len(u.errs) > 0:
		x.log.Warn("not all names that buckets and origins keep are known", "restored", x.restored.Load(), "error", err)
	case before > 0 && len(u.errs) == 0:
		x.log.Info("all names that buckets and origins keep are known")
	}
}

// fill restores what SQL does not know yet. An error loses nothing of what was restored before it: the next call goes
// on from there, and one bucket's trouble does not stop the others.
func (x *Index) fill(ctx context.Context) error {
	began := time.Now()
	if !x.heard() {
		if err := x.hear(ctx); err != nil {
			return err
		}
	}
	if x.restored.Load() {
		return nil
	}
	var mu sync.Mutex
	var errs []error
	var wg sync.WaitGroup
	err := x.buckets.All(func(name string, b bucket.Bucket) error {
		wg.Go(func() {
			err := x.sweep(ctx, name, b)
			if err == nil {
				err = x.sweepDone(ctx, name)
			}
			mu.Lock()
			defer mu.Unlock()
			errs = append(errs, err)
		})
		return nil
	})
	wg.Wait()
	if err := errors.Join(append(errs, err)...); err != nil {
		return err
	}
	err = x.db.Update(ctx, func(tx names.Tx) error {
		err := errors.Join(tx.RaiseGeneration(x.generation.Load()), tx.SetMeta(metaRestored, time.Now().UTC().Format(time.RFC3339)), tx.SetMeta(metaStale, ""))
		return errors.Join(err, x.buckets.All(func(name string, _ bucket.Bucket) error { return setSweep(tx, name, sweep{}) }))
	})
	if err != nil {
		return err
	}
	x.restored.Store(true)
	x.stale.Store(false)
	x.unproven.clear()
	x.wake() // deletions have waited
	x.log.Info("names are restored", "seconds", time.Since(began).Seconds())
	return nil
}

// sweepDone notes that SQL has all names of a bucket.
func (x *Index) sweepDone(ctx context.Context, name string) error {
	if err := x.db.Update(ctx, func(tx names.Tx) error { return setSweep(tx, name, sweep{Done: true}) }); err != nil {
		return err
	}
	x.sweptBuckets.Store(name, true)
	return nil
}

// swept reports whether SQL has all names of a bucket, although others may still be restored.
func (x *Index) swept(name string) bool {
	_, ok := x.sweptBuckets.Load(name)
	return ok && x.heard()
}

// hear takes over what origins keep. All but replicas - 1 must be heard, because a change that the bucket lacks is on
// as many origins as there are replicas; the others are heard when they are back.
func (x *Index) hear(ctx context.Context) error {
	if !x.restored.Load() {
		if err := x.db.Update(ctx, func(tx names.Tx) error { return tx.SetMeta(metaHearing, "begun") }); err != nil {
			return err
		}
	}
	err := x.reconcile(ctx, x.origins.All())
	if x.heard() {
		return nil
	}
	return err
}

// setHeard says that enough origins were heard since the start.
func (x *Index) setHeard() { x.hearOnce.Do(func() { close(x.heardOrigins) }) }

// reconcile asks origins for their records. All that one has counts that is asked for the first time since the
// start: SQL may be new, or have gone back in time, and what was written since has later generations. Of the others a
// record that is newer than SQL is adopted, and one whose change is in the bucket already is taken back: its origin was
// away when the others forgot it. Changes that this process makes are left alone.
func (x *Index) reconcile(ctx context.Context, origins []*cluster.Origin) error {
	x.writing.prune()
	state, err := x.db.State(ctx)
	if err != nil {
		return err
	}
	rounds, errs := x.hearEach(ctx, origins, state.LastGeneration)
	var t round
	for i, o := range origins {
		if errs[i] != nil {
			errs[i] = fmt.Errorf("origin %s: %w", o.ID, errs[i])
			continue
		}
		t.heard = append(t.heard, o.ID)
		t.adopt, t.aside, t.wait = append(t.adopt, rounds[i].adopt...), append(t.aside, rounds[i].aside...), append(t.wait, rounds[i].wait...)
		t.refusals = append(t.refusals, rounds[i].refusals...)
	}
	failed := len(origins) - len(t.heard)
	if failed >= x.copies() && !x.restored.Load() && !x.heard() {
		return errors.Join(errs...) // part of what they keep could hide the rest
	}
	if err := x.takeRefused(ctx, &t); err != nil {
		return errors.Join(append(errs, err)...)
	}
	if err := x.finish(ctx, &t, x.tombstones(t.adopt)); err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, id := range t.heard {
		x.heardFrom.Store(id, true)
	}
	if !x.counted.Load() && len(t.heard) == len(x.origins.All()) {
		err := x.addShort(ctx, t.wait)
		errs = append(errs, err)
		x.counted.Store(err == nil)
	}
	unheard := slices.DeleteFunc(slices.Clone(x.origins.All()), x.hasHeard)
	if len(unheard) < x.copies() {
		x.setHeard()
	}
	return errors.Join(errs...)
}

// restWait is for how long a start waits for further origins once enough were heard, or for as long again as those
// took.
const restWait = cluster.Stall / 4

// hearEach asks origins what they keep, and returns a round and an error of each. Until enough were heard since the
// start they are asked at once, and the rest is given up soon after: requests wait for these answers, and who is left
// out is heard late.
func (x *Index) hearEach(ctx context.Context, origins []*cluster.Origin, known int64) ([]round, []error) {
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	rounds, errs := make([]round, len(origins)), make([]error, len(origins))
	began, starts := time.Now(), !x.heard()
	var bytes sync.Map
	var enough atomic.Int32
	enough.Store(int32(len(origins) - x.copies() + 1))
	var g errgroup.Group
	if !starts {
		g.SetLimit(1) // there is time, and a list may be long
	}
	for i, o := range origins {
		rounds[i].known, rounds[i].bytes = known, &bytes
		g.Go(func() error {
			if errs[i] = x.hearOne(ctx, o, &rounds[i]); errs[i] == nil && enough.Add(-1) == 0 && starts {
				time.AfterFunc(max(restWait, time.Since(began)), func() { giveUp(errLeftOut) })
			}
			return nil
		})
	}
	_ = g.Wait() // each origin has its own error
	return rounds, errs
}

// errLeftOut is an origin that takes longer than others, which are enough, at a start.
var errLeftOut = fmt.Errorf("%w: it is heard later than others, which are enough", registry.ErrUnavailable)

// hearOne adds what one origin keeps to the round, and takes back what is in the bucket. Blobs that it owes, or has
// paid a moment ago, become members if it is asked for the first time. One that hangs is given up soon.
func (x *Index) hearOne(ctx context.Context, o *cluster.Origin, t *round) error {
	ctx = transport.WithProgressTimeout(ctx, cluster.Stall)
	first := !x.hasHeard(o)
	var old []cluster.NameDeletion
	err := x.eachRecord(ctx, o, func(e entry) error {
		take, err := x.sortRecord(ctx, o, e, t)
		switch {
		case err != nil || !take:
			return err
		case e.record.Generation <= t.known && !first && !x.aside.has(cluster.NameKey(e.record), e.record.Generation):
			old = append(old, x.signer.Deletion(e.record))
		case e.err != nil:
			t.setAside(e)
		default:
			if e.record.Bytes, err = x.bytesToKeep(ctx, t, e.record); err != nil {
				return err
			}
			t.adopt = append(t.adopt, e)
		}
		return nil
	})
	if err == nil && first {
		err = x.adoptPending(ctx, o)
	}
	if err != nil {
		return err
	}
	for _, d := range old {
		if err := o.DeleteName(ctx, d, x.tenure.id); err != nil && !errors.Is(err, registry.ErrHeld) {
			return err
		}
	}
	return nil
}

// sortRecord looks at a record of an origin, and reports whether it is to be taken over or back: it is of no change
// that is under way or queued. The others it adds to the round.
func (x *Index) sortRecord(ctx context.Context, o *cluster.Origin, e entry, t *round) (take bool, err error) {
	_, refusal := e.record.Refuses()
	switch {
	case e.err != nil && (refusal || !errors.Is(e.err, registry.ErrDenied)):
		t.setAside(e) // what it says of itself is worth nothing
		return false, nil
	case refusal:
		t.refusals = append(t.refusals, e)
		return false, nil
	case x.writing.has(e.record):
		return false, nil
	case e.record.Generation > t.known || x.aside.has(cluster.NameKey(e.record), e.record.Generation):
		return true, nil
	}
	queued, err := x.isQueued(ctx, o, e)
	if queued && !x.counted.Load() && e.err == nil {
		t.wait = append(t.wait, idOf(e.record))
	}
	return !queued, err
}

// isQueued reports whether the change of a record waits for the bucket. A record that nobody signed, because it was
// written before there was a key, is signed then.
func (x *Index) isQueued(ctx context.Context, o *cluster.Origin, e entry) (bool, error) {
	rows, err := x.db.Queued(ctx, e.record.Generation)
	if err != nil {
		return false, err
	}
	for _, row := range rows {
		if row.Err != nil || cluster.NameKey(row.Record) == cluster.NameKey(e.record) {
			if errors.Is(e.err, registry.ErrDenied) && row.Err == nil {
				return true, x.signAgain(ctx, o, row.Record)
			}
			return true, nil
		}
	}
	return false, nil
}

// signAgain replaces an origin's record of a queued change by a signed one.
func (x *Index) signAgain(ctx context.Context, o *cluster.Origin, r cluster.NameRecord) error {
	if x.signer == nil {
		return nil
	}
	r, _, err := x.recordOfQueued(ctx, r)
	if err != nil {
		return ignoreMissing(err) // deleted since; the outbox forgets the record
	}
	return o.PutName(ctx, x.signer.Sign(r), x.tenure.id)
}

// finish adopts what a round has found and notes what was set aside.
func (x *Index) finish(ctx context.Context, t *round, dead cluster.Latest) error {
	if err := x.adoptAll(ctx, t, dead); err != nil {
		return err
	}
	x.unproven.setLater(t.later, len(t.heard) == len(x.origins.All()))
	fresh, changed := x.aside.replace(t.heard, t.aside)
	for _, r := range fresh {
		x.m.setAside.Inc()
		x.log.Warn("a name record is set aside; others go on", "origin", r.Where, "key", r.Key, "kind", r.Kind, "repository", r.Repository,
			"tag", r.Tag, "digest", r.Digest, "generation", r.Generation, "error", r.Error)
	}
	if !changed {
		return nil
	}
	return x.aside.save(ctx, x.db)
}

// hasHeard reports whether all that an origin keeps was taken over since the start. Until then it forgets nothing,
// because this database may have gone back in time.
func (x *Index) hasHeard(o *cluster.Origin) bool {
	_, ok := x.heardFrom.Load(o.ID)
	return ok
}

// adoptPending makes blobs that an origin owes to a bucket, or did a moment ago, members of the repositories that they
// were pushed to.
func (x *Index) adoptPending(ctx context.Context, o *cluster.Origin) error {
	return o.Pending(ctx, func(p cluster.PendingBlob) error {
		for _, repo := range p.Repositories {
			r := pushed(repo, cluster.Layer{Digest: p.Digest, Size: p.Size}, 1)
			if known, err := x.known(ctx, r); err != nil {
				return err
			} else if known {
				continue
			}
			if !x.restored.Load() {
				x.unproven.add(r)
			}
			err := x.db.Update(ctx, func(tx names.Tx) error {
				return errors.Join(tx.PutLayer(repo, p.Digest, p.Size, r.Generation), x.enqueue(tx, r))
			})
			if ignoreNewer(err) != nil {
				return err
			}
		}
		return nil
	})
}
