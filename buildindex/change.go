package buildindex

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// errClock is that the counter of generations can't go up.
var errClock = errors.New("the counter of changes is further ahead of this machine's clock than a change may be: set the clock right")

func generationHolds(n int64) error {
	if limit := time.Now().Add(cluster.MaxGenerationSkew); n >= limit.UnixMicro() {
		return fmt.Errorf("%w: it stands at %d, and %s from now is %d", errClock, n, cluster.MaxGenerationSkew, limit.UnixMicro())
	}
	return nil
}

// nextGeneration rises for ever, across restarts and restores on an empty disk: it is the time in microseconds, or one
// more than the last. ErrUnavailable when that is so far from now that nobody would believe it.
func (x *Index) nextGeneration() (int64, error) {
	for {
		last := x.generation.Load()
		if err := generationHolds(last); err != nil {
			return 0, fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
		}
		next := max(time.Now().UnixMicro(), last+1)
		if x.generation.CompareAndSwap(last, next) {
			return next, nil
		}
	}
}

func (x *Index) sawGeneration(n int64) {
	for {
		last := x.generation.Load()
		if n <= last || x.generation.CompareAndSwap(last, n) {
			return
		}
	}
}

// lock lets one writer at a time change some names of a repository. The caller calls what it returns, unless ctx ends
// before its turn.
func (x *Index) lock(ctx context.Context, repo string, names ...string) (unlock func(), err error) {
	var want, held []int
	for _, n := range names {
		want = append(want, int(maphash.String(x.seed, repo+"\x00"+n)%uint64(len(x.stripes))))
	}
	unlock = func() {
		for _, i := range held {
			<-x.stripes[i]
		}
	}
	slices.Sort(want) // so that two writers can't wait for each other
	for _, i := range slices.Compact(want) {
		select {
		case x.stripes[i] <- struct{}{}:
			held = append(held, i)
		case <-ctx.Done():
			unlock()
			return nil, context.Cause(ctx)
		}
	}
	return unlock, nil
}

// storeRecord writes r to as many origins as there are replicas, and reports whether they all keep it. Of fewer copies
// others are made when there are origins for them (topUp). ErrUnavailable when none keeps it, or when too few do
// because others have given their lease to another build-index: that one would not ask the bucket. raw is the
// manifest's bytes, for origins that know whole records only.
func (x *Index) storeRecord(ctx context.Context, r cluster.NameRecord, raw []byte) (kept bool, err error) {
	copies, err := x.keepRecord(ctx, r, raw)
	switch {
	case copies >= x.copies():
		x.short.remove(r)
		return true, nil
	case copies > 0 && !errors.Is(err, registry.ErrHeld):
		x.short.add(shortRecord{r, raw})
		x.log.Warn("a change waits for the bucket, because fewer origins keep it than configured", "repository", r.Repository, "tag", r.Tag, "digest", r.Digest, "copies", copies, "error", err)
		return false, nil
	}
	err = fmt.Errorf("too few origins keep the name: %w", err)
	if errors.Is(err, registry.ErrHeld) {
		return false, isAway(err)
	}
	return false, &registry.RetryError{Err: fmt.Errorf("%w: %w", registry.ErrUnavailable, err), After: time.Second}
}

// noBucket is the refusal of a change that the bucket can't make up for.
func (x *Index) noBucket(repo string) error {
	name := x.bucketOf(repo)
	x.wake() // it may be back
	return &registry.RetryError{Err: fmt.Errorf("%w: too few origins keep the change, and bucket %q is away", registry.ErrUnavailable, name), After: time.Second}
}

// keepRecord writes r to cfg.Replicas origins in parallel, trying further ones for those that fail or don't answer. It
// returns how many have it, and what the others said.
func (x *Index) keepRecord(ctx context.Context, r cluster.NameRecord, raw []byte) (copies int, err error) {
	out := cluster.Ask(ctx, x.origins, x.origins.For(placeOf(r)), x.cfg.Replicas, cluster.Question[struct{}]{Ask: func(ctx context.Context, o *cluster.Origin) (struct{}, error) {
		if err := x.putName(ctx, o, r, raw); err != nil {
			return struct{}{}, fmt.Errorf("origin %s: %w", o.ID, err)
		}
		return struct{}{}, nil
	}})
	failed := out.Errs
	for _, o := range out.Silent {
		failed = append(failed, fmt.Errorf("origin %s: %w", o.ID, transport.ErrNoProgress))
	}
	return len(out.Answers), errors.Join(failed...)
}

// placeOf is what decides which origins keep a record: all of one manifest's are together.
func placeOf(r cluster.NameRecord) digest.Digest {
	if r.Change().PutsManifest() {
		return digest.FromString(r.Repository + "\x00" + r.Digest.String())
	}
	return digest.FromString(cluster.NameKey(r))
}

func (x *Index) putName(ctx context.Context, o *cluster.Origin, r cluster.NameRecord, raw []byte) error {
	err := o.PutName(ctx, r, x.tenure.id)
	var kind *registry.Error
	if err == nil || r.Version == cluster.NameWhole || !errors.As(err, &kind) || kind.Status != http.StatusBadRequest || kind == registry.ErrRecordInvalid {
		return err
	}
	// An origin of the version before knows whole records only.
	r.Version, r.Bytes = cluster.NameWhole, raw
	return o.PutName(ctx, x.signer.Sign(r), x.tenure.id)
}

// change makes changes durable in their second place and commits them in SQL with their outbox rows, all or none. Of
// records of one manifest the first has the bytes. ErrTooFewCopies, after the commit, when the second place is the
// bucket, and that is slow.
func (x *Index) change(ctx context.Context, rs []cluster.NameRecord, f func(names.Tx) error) error {
	// What has begun is finished: a client that goes away must not leave one place ahead of the other.
	ctx = context.WithoutCancel(ctx)
	x.writing.begin(rs)
	defer x.writing.end(rs)
	var waits []cluster.NameRecord
	for i, r := range rs {
		kept, err := x.storeRecord(ctx, x.signer.Sign(r), rs[0].Bytes)
		if err != nil {
			for _, r := range rs[:i+1] {
				x.retract(ctx, r) // a few may keep it
			}
			return err // it may yet come
		}
		if !kept {
			waits = append(waits, r)
		}
	}
	if len(waits) > 0 && x.bucketIsAway(rs[0].Repository) {
		return x.takeBack(ctx, rs, x.noBucket(rs[0].Repository))
	}
	published := x.publications.expect(waits)
	defer x.publications.forget(waits)
	err := x.db.Update(ctx, func(tx names.Tx) error {
		if err := f(tx); err != nil {
			return err
		}
		for _, r := range rs {
			if err := x.enqueue(tx, r); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return x.takeBack(ctx, rs, x.conflict(x.full(err)))
	}
	for _, r := range rs {
		x.unproven.written(r)
		x.lookups.know(r)
	}
	x.wake()
	return x.awaitBucket(ctx, published)
}

// conflict returns what a client is told of a write that was not done because of what is there. A later generation than
// this change's was adopted, or written by another process, since it began: ErrUnavailable, and tried again it gets one
// above that.
func (x *Index) conflict(err error) error {
	var c *names.Conflict
	switch {
	case !errors.As(err, &c):
		return err
	case c.Kind == names.ErrNewer:
		x.sawGeneration(c.Now.Generation)
		return isAway(err)
	}
	return refused(c)
}

// forget takes a record back from the origins, and reports whether all have said that they don't keep it any more.
func (x *Index) forget(ctx context.Context, r cluster.NameRecord) bool {
	x.short.remove(r)
	ctx = transport.WithProgressTimeout(ctx, cluster.Stall)
	var left atomic.Bool
	var wg sync.WaitGroup
	for _, o := range x.origins.All() {
		if !o.Answers() {
			left.Store(true)
			continue
		}
		wg.Go(func() {
			if err := o.DeleteName(ctx, x.signer.Deletion(r), x.tenure.id); err != nil {
				left.Store(true)
				x.log.Debug("origin still keeps a name", "origin", o.ID, "error", err)
			}
		})
	}
	wg.Wait()
	return !left.Load()
}

// retract takes the record of a change back that was not made, and reports whether all origins have said that they
// don't keep it any more. It stood in the place of an earlier one of the same key, as of a push that is repeated: where
// the bucket lacks that one, origins keep it again.
func (x *Index) retract(ctx context.Context, r cluster.NameRecord) bool {
	gone := x.forget(ctx, r)
	x.keepBefore(ctx, r)
	return gone
}

// keepBefore brings the record in whose place r stood to origins once more, if its change is still queued.
func (x *Index) keepBefore(ctx context.Context, r cluster.NameRecord) {
	row, err := x.db.QueuedBefore(ctx, cluster.NameKey(r), r.Generation)
	if err == nil && row.Err == nil && row.Record.Version != unrecorded {
		var before cluster.NameRecord
		var raw []byte
		if before, raw, err = x.recordOfQueued(ctx, row.Record); err == nil {
			_, err = x.storeRecord(ctx, x.signer.Sign(before), raw)
		}
	}
	if ignoreMissing(err) != nil {
		x.log.Warn("a change is in fewer places than it was, until the bucket has it", "repository", r.Repository, "tag", r.Tag, "digest", r.Digest, "error", err)
	}
}

// recordOfQueued returns the record of a queued change as origins keep it, not signed, and the bytes of its manifest if
// it puts one; names.ErrNotFound where that was deleted since.
func (x *Index) recordOfQueued(ctx context.Context, r cluster.NameRecord) (_ cluster.NameRecord, raw []byte, err error) {
	if !r.Change().PutsManifest() {
		return r, nil, nil
	}
	m, err := x.db.Manifest(ctx, r.Repository, registry.Reference{Digest: r.Digest})
	if err == nil && r.Version == cluster.NameWhole {
		r.Bytes = m.Bytes
	}
	return r, m.Bytes, err
}

// record returns the record of a change that is made now, with the next generation. ErrUnavailable as from
// nextGeneration.
func (x *Index) record(c cluster.Change) (cluster.NameRecord, error) {
	n, err := x.nextGeneration()
	return cluster.NewRecord(c.At(n), time.Now()), err
}

// apply writes a manifest's record to SQL.
func (x *Index) apply(tx names.Tx, r cluster.NameRecord, p *parsed) error {
	err := tx.PutManifest(names.Manifest{
		Repository: r.Repository, Digest: r.Digest, MediaType: r.MediaType, ArtifactType: p.artifactType, Subject: p.subject,
		Generation: r.Generation, Bytes: r.Bytes,
	})
	if err == nil && r.Tag != "" {
		err = tx.PutTag(r.Repository, r.Tag, names.Version{Digest: r.Digest, Generation: r.Generation})
	}
	return err
}

// applyDeletion deletes a manifest with its tags, whose deletions it queues, each at the generation that the tag had;
// ErrDenied when one of them is immutable.
func (x *Index) applyDeletion(tx names.Tx, r cluster.NameRecord) error {
	tags, err := tx.DeleteManifest(r.Repository, r.Digest, r.Generation)
	if err != nil {
		return err
	}
	for _, t := range tags {
		if x.cfg.immutable(r.Repository, t.Tag) {
			return errImmutable(r.Repository, t.Tag)
		}
	}
	return x.enqueueTags(tx, r.Repository, tags)
}
