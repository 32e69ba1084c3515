package buildindex

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

const (
	metaRestored = "restored" // set once SQL has what the bucket and enough origins know
	metaUnheard  = "unheard"  // the origins, a JSON list of ids, that could not be asked at that time
)

const (
	reconcileEvery = time.Minute
	restoreMin     = 200 * time.Millisecond
	restoreMax     = 5 * time.Second // between tries of a restoration
	// settled is the age from which a record belongs to no change that is still under way.
	settled = time.Minute
)

// restore makes SQL know what the buckets and the records that origins keep say, then compares SQL with these records
// now and then, until ctx is done.
func (x *Index) restore(ctx context.Context) error {
	select {
	case <-x.tenure.begun:
	case <-ctx.Done():
		return nil
	}
	wait := restoreMin
	for {
		err := x.fill(ctx)
		next := reconcileEvery
		switch {
		case err != nil:
			next = wait
			wait = min(2*wait, restoreMax)
		default:
			wait = restoreMin
			err = x.reconcile(ctx, x.began)
		}
		x.reportRestore(ctx, err)
		timer := time.NewTimer(next)
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		}
	}
}

// reportRestore logs an error once, until there is none.
func (x *Index) reportRestore(ctx context.Context, err error) {
	if ctx.Err() != nil || (err != nil) == x.restoreFailed {
		return
	}
	x.restoreFailed = err != nil
	if err != nil {
		x.log.Warn("not all names that buckets and origins keep are known", "restored", x.restored.Load(), "error", err)
	} else {
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

// hear takes over what origins keep. All but replicas - 1 must be heard, because a record is on as many origins as
// there are replicas; the others are heard when they are back, also after a restart. While SQL was restored earlier
// only what is newer than SQL counts.
func (x *Index) hear(ctx context.Context) error {
	if x.restored.Load() {
		return x.reconcile(ctx, x.began)
	}
	if err := x.db.Update(ctx, func(tx names.Tx) error { return tx.SetMeta(metaHearing, "begun") }); err != nil {
		return err
	}
	origins := x.origins.All()
	heard, errs := make([][]entry, len(origins)), make([]error, len(origins))
	var wg sync.WaitGroup
	for i, o := range origins {
		wg.Go(func() {
			if heard[i], errs[i] = x.recordsOf(ctx, o); errs[i] == nil {
				errs[i] = x.adoptPending(ctx, o)
			}
			if errs[i] != nil {
				errs[i] = fmt.Errorf("origin %s: %w", o.ID, errs[i])
			}
		})
	}
	wg.Wait()
	var t round
	var unheard []string
	for i, o := range origins {
		if errs[i] != nil {
			unheard = append(unheard, o.ID)
			continue
		}
		t.heard = append(t.heard, o.ID)
		for _, e := range heard[i] {
			if e.err != nil {
				t.setAside(e)
			} else {
				t.adopt = append(t.adopt, e)
			}
		}
	}
	if len(unheard) > max(0, x.cfg.Replicas-1) {
		return errors.Join(errs...)
	}
	if err := x.finish(ctx, &t, x.tombstones(t.adopt)); err != nil {
		return err
	}
	if err := x.db.Update(ctx, func(tx names.Tx) error { return setUnheard(tx, unheard) }); err != nil {
		return err
	}
	x.log.Info("origins were heard", "records", len(t.adopt), "set_aside", len(t.aside), "origins_not_heard", unheard)
	x.setHeard()
	return nil
}

// setHeard says that enough origins were heard since the start.
func (x *Index) setHeard() { x.hearOnce.Do(func() { close(x.heardOrigins) }) }

func setUnheard(tx names.Tx, ids []string) error {
	b, err := json.Marshal(ids)
	if err != nil {
		return err
	}
	return tx.SetMeta(metaUnheard, string(b))
}

// reconcile asks every origin for its records. One that could not be asked when SQL was restored is heard in full. Of
// the others, a record that is newer than SQL is adopted (SQL went back in time), and one whose change is in the bucket
// already is taken back: its origin was away when the others forgot it. Records of this process may belong to changes
// under way and are left alone until they are settled.
func (x *Index) reconcile(ctx context.Context, began time.Time) error {
	var unheard []string
	v, err := x.db.Meta(ctx, metaUnheard)
	if err == nil && v != "" {
		err = json.Unmarshal([]byte(v), &unheard)
	}
	if err != nil {
		return fmt.Errorf("origins that were not heard: %w", err)
	}
	state, err := x.db.State(ctx)
	if err != nil {
		return err
	}
	var errs []error
	t := round{known: state.LastGeneration, began: began}
	late := 0
	for _, o := range x.origins.All() {
		t.late = slices.Contains(unheard, o.ID)
		if err := x.reconcileWith(ctx, o, &t); err != nil {
			errs = append(errs, fmt.Errorf("origin %s: %w", o.ID, err))
			continue
		}
		t.heard = append(t.heard, o.ID)
		if t.late {
			late++
		}
	}
	if err := x.finish(ctx, &t, x.tombstones(t.adopt)); err != nil {
		return errors.Join(append(errs, err)...)
	}
	if len(errs) < x.cfg.Replicas {
		x.setHeard()
	}
	if late > 0 {
		unheard = slices.DeleteFunc(unheard, func(id string) bool { return slices.Contains(t.heard, id) })
		errs = append(errs, x.db.Update(ctx, func(tx names.Tx) error { return setUnheard(tx, unheard) }))
	}
	return errors.Join(errs...)
}

// reconcileWith adds what one origin keeps to the round, and takes back what is in the bucket.
func (x *Index) reconcileWith(ctx context.Context, o *cluster.Origin, t *round) error {
	entries, err := x.recordsOf(ctx, o)
	if err != nil {
		return err
	}
	if t.late || !x.heard() {
		if err := x.adoptPending(ctx, o); err != nil {
			return err
		}
	}
	for _, e := range entries {
		aside := x.aside.has(cluster.NameKey(e.record), e.record.Generation)
		switch {
		case e.err != nil && !errors.Is(e.err, registry.ErrDenied):
			t.setAside(e) // what it says of itself is worth nothing
		case !t.late && !aside && e.record.Generation <= t.known:
			if err := x.reconcileKnown(ctx, o, e); err != nil {
				return err
			}
		case e.err != nil:
			t.setAside(e)
		case !t.late && !aside && e.record.Time.After(t.began) && time.Since(e.record.Time) < settled:
		default:
			t.adopt = append(t.adopt, e)
		}
	}
	return nil
}

// reconcileKnown handles a record that is not newer than SQL: it is taken back unless its change is still queued. A
// queued one that nobody signed, because it was written before there was a key, is signed.
func (x *Index) reconcileKnown(ctx context.Context, o *cluster.Origin, e entry) error {
	rows, err := x.db.Queued(ctx, e.record.Generation)
	if err != nil {
		return err
	}
	for _, row := range rows {
		if row.Err != nil || cluster.NameKey(row.Record) == cluster.NameKey(e.record) {
			if errors.Is(e.err, registry.ErrDenied) && row.Err == nil {
				return x.signAgain(ctx, o, row.Record)
			}
			return nil
		}
	}
	return o.DeleteName(ctx, x.signer.Deletion(e.record))
}

// signAgain replaces an origin's record of a queued change by a signed one.
func (x *Index) signAgain(ctx context.Context, o *cluster.Origin, r cluster.NameRecord) error {
	if x.signer == nil {
		return nil
	}
	if r.Change().PutsManifest() && r.Version == cluster.NameWhole {
		m, err := x.db.Manifest(ctx, r.Repository, registry.Reference{Digest: r.Digest})
		if err != nil {
			return ignoreMissing(err) // deleted since; the outbox forgets the record
		}
		r.Bytes = m.Bytes
	}
	return o.PutName(ctx, x.signer.Sign(r))
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

// adoptPending makes blobs that an origin owes to a bucket members of the repositories that they were pushed to.
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
