package buildindex

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
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
	restoreMax     = 5 * time.Second // between tries of a restoration
	// settled is the age from which a record belongs to no change that is still under way.
	settled = time.Minute
)

// restore fills an empty database from the bucket and from the records that origins keep, then compares SQL with these
// records now and then, until ctx is done.
func (x *Index) restore(ctx context.Context) error {
	began := time.Now()
	wait := 200 * time.Millisecond
	for {
		var err error
		next := reconcileEvery
		if x.restored.Load() {
			err = x.reconcile(ctx, began)
		} else if err = x.fill(ctx); err != nil {
			next = wait
			wait = min(2*wait, restoreMax)
		} else {
			next = 0 // origins that were not heard
		}
		if err != nil && ctx.Err() == nil {
			x.log.Warn("not all names that origins keep are known", "restored", x.restored.Load(), "again_in", next, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(next):
		}
	}
}

// fill restores. The bucket and all but replicas - 1 origins must be heard: a record is on as many origins as there are
// replicas.
func (x *Index) fill(ctx context.Context) error {
	began := time.Now()
	var t round
	var errs []error
	var unheard []string
	for _, o := range x.origins.All() {
		h, err := x.recordsOf(ctx, o)
		if err == nil {
			err = x.adoptPending(ctx, o)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("origin %s: %w", o.ID, err))
			unheard = append(unheard, o.ID)
			continue
		}
		t.heard = append(t.heard, o.ID)
		for _, e := range h {
			if e.err != nil {
				t.setAside(e)
			} else {
				t.adopt = append(t.adopt, e)
			}
		}
	}
	if len(errs) > max(0, x.cfg.Replicas-1) {
		return errors.Join(errs...)
	}
	dead := x.tombstones(t.adopt)
	err := x.buckets.All(func(name string, b bucket.Bucket) error { return x.fromBucket(ctx, name, b, dead) })
	if err != nil {
		return err
	}
	if err := x.finish(ctx, &t, dead); err != nil {
		return err
	}
	err = x.db.Update(ctx, func(tx names.Tx) error {
		return errors.Join(tx.RaiseGeneration(x.generation.Load()), setUnheard(tx, unheard), tx.SetMeta(metaRestored, time.Now().UTC().Format(time.RFC3339)))
	})
	if err != nil {
		return err
	}
	x.restored.Store(true)
	x.log.Info("names are restored", "seconds", time.Since(began).Seconds(), "records", len(t.adopt), "set_aside", len(t.aside), "origins_not_heard", unheard)
	return nil
}

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
	if t.late {
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

func (x *Index) adoptPending(ctx context.Context, o *cluster.Origin) error {
	return o.Pending(ctx, func(p cluster.PendingBlob) error {
		for _, repo := range p.Repositories {
			if err := x.putLayer(ctx, repo, cluster.Layer{Digest: p.Digest, Size: p.Size}); err != nil {
				return err
			}
		}
		return nil
	})
}
