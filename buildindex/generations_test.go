package buildindex

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// publish writes everything that is queued.
func (r *rig) publish() {
	r.Helper()
	if left, err := r.x.drain(r.Context()); err != nil || left {
		r.Fatalf("left %v, %v", left, err)
	}
}

// deletions are the records of deletions that the origins keep now.
func (r *rig) deletions() (all []cluster.NameRecord) {
	for _, o := range r.origins {
		o.set(func() {
			for _, rec := range o.names {
				if rec.Change().Act == cluster.Delete {
					all = append(all, rec)
				}
			}
		})
	}
	return all
}

// onlyBucket loses everything else, and restores.
func (r *rig) onlyBucket(database string) {
	r.Helper()
	for _, o := range r.origins {
		o.set(func() { clear(o.names); o.pending = nil })
	}
	r.start(database)
	r.must(r.x.fill(r.Context()))
}

func (r *rig) wantLayer(d digest.Digest, want bool) {
	r.Helper()
	_, err := r.x.getLayer(r.Context(), "repo", d)
	if want && err != nil || !want && !errors.Is(err, registry.ErrBlobUnknown) {
		r.Errorf("membership of %s: %v; want that it is there: %v", d, err, want)
	}
}

func restoredRig(t *testing.T) *rig {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	r.durable(true)
	return r
}

// A deletion that an origin kept which was away deletes nothing of what was pushed after it: neither in SQL nor in the
// bucket, by digest or by tag, with its memberships.
func TestOldTombstoneRemovesNothing(t *testing.T) {
	for _, tag := range []string{"v", ""} {
		r := restoredRig(t)
		a := r.put(tag, "one")
		blob := digest.FromString("one")
		r.publish()
		r.delete(registry.Reference{Digest: a})
		r.must(r.x.deleteLayer(t.Context(), "repo", blob))
		old := r.deletions()
		r.publish()
		r.put(tag, "one")
		r.publish()
		for _, rec := range old {
			r.plant(rec)
		}
		r.lose()
		r.publish()
		for i, database := range []string{"second.db", "third.db", "fourth.db"} {
			r.wantManifest(a, true)
			r.wantLayer(blob, true)
			if tag != "" {
				r.wantTag(tag, a)
			}
			if i == 0 {
				continue
			}
			r.onlyBucket(database)
		}
	}
}

// What was deleted stays deleted, also when the restore that heard of it is lost as well.
func TestDeletedStaysDeleted(t *testing.T) {
	r := restoredRig(t)
	a, b := r.put("v", "one"), r.put("w", "two")
	r.publish()
	r.delete(registry.Reference{Digest: a}) // takes the tag v
	r.delete(registry.Reference{Tag: "w"})
	r.must(r.x.deleteLayer(t.Context(), "repo", digest.FromString("two")))
	r.lose() // before the bucket knows
	r.publish()
	for _, database := range []string{"third.db", "fourth.db"} {
		r.wantTag("v", "")
		r.wantTag("w", "")
		r.wantManifest(a, false)
		r.wantManifest(b, true)
		r.wantLayer(digest.FromString("two"), false)
		r.onlyBucket(database)
	}
	// Nor do tags come back with the manifest that they named.
	r.put("other", "one")
	r.publish()
	r.onlyBucket("fifth.db")
	r.wantTag("v", "")
	r.wantTag("other", a)
}

// A tag whose manifest was deleted, and which only the bucket knows because its own deletion was never written, is
// deleted there by the restore.
func TestTagOfADeletedManifest(t *testing.T) {
	r := restoredRig(t)
	a := r.put("v", "one")
	r.publish()
	_, b, _ := r.x.buckets.For("repo")
	n, err := r.x.nextGeneration()
	r.must(err)
	r.must(putStamp(t.Context(), b, layout.Stamp{Change: cluster.DeleteName(cluster.ManifestName("repo", a)).At(n)}))
	r.onlyBucket("second.db")
	r.wantTag("v", "")
	r.publish()
	r.put("other", "one")
	r.publish()
	r.onlyBucket("third.db")
	r.wantTag("v", "")
	r.wantTag("other", a)
}

// A blob that was deleted and pushed again is there after a restore, although only its marker at the origins, which has
// no generation, and a record tell it from what was deleted.
func TestDeletedAndPushedAgain(t *testing.T) {
	r := restoredRig(t)
	blob := cluster.Layer{Digest: digest.FromString("blob"), Size: 4}
	r.must(r.x.putLayer(t.Context(), "repo", blob))
	r.publish()
	r.must(r.x.deleteLayer(t.Context(), "repo", blob.Digest))
	r.publish()
	r.durable(false)
	r.must(r.x.putLayer(t.Context(), "repo", blob))
	r.owe(blob)
	r.lose() // before the bucket knows
	r.wantLayer(blob.Digest, true)
	r.owe()
	r.publish()
	r.onlyBucket("third.db")
	r.wantLayer(blob.Digest, true)
}

// So it is when it was pushed a third time, of which there is no record: that of the second stays until the bucket has
// the membership.
func TestDeletedAndPushedAgainTwice(t *testing.T) {
	r := restoredRig(t)
	blob := cluster.Layer{Digest: digest.FromString("blob"), Size: 4}
	r.must(r.x.putLayer(t.Context(), "repo", blob))
	r.publish()
	r.must(r.x.deleteLayer(t.Context(), "repo", blob.Digest))
	r.publish()
	r.owe(blob)
	r.must(r.x.putLayer(t.Context(), "repo", blob))
	r.must(r.x.putLayer(t.Context(), "repo", blob))
	if left, err := r.x.drain(t.Context()); err != nil || !left {
		t.Fatalf("left %v, %v; want that the membership waits for its blob", left, err)
	}
	r.lose() // before the bucket knows
	r.wantLayer(blob.Digest, true)
	r.owe()
	r.publish()
	r.onlyBucket("third.db")
	r.wantLayer(blob.Digest, true)
}

// owe makes the origins owe these blobs, which were pushed to repo, and no others.
func (r *rig) owe(blobs ...cluster.Layer) {
	r.durable(len(blobs) == 0)
	for _, o := range r.origins {
		o.set(func() {
			o.pending = nil
			for _, b := range blobs {
				o.pending = append(o.pending, cluster.PendingBlob{Digest: b.Digest, Size: b.Size, Repositories: []string{"repo"}})
			}
		})
	}
}

// A blob that is deleted while origins still owe it stays deleted: the link that one writes when it has paid is removed
// again, and no restore believes it.
func TestDeletedWhileItIsOwed(t *testing.T) {
	for _, lost := range []bool{false, true} {
		r := restoredRig(t)
		blob := cluster.Layer{Digest: digest.FromString("blob"), Size: 4}
		r.must(r.x.putLayer(t.Context(), "repo", blob))
		r.owe(blob)
		r.must(r.x.deleteLayer(t.Context(), "repo", blob.Digest))
		if lost {
			r.lose()
			r.wantLayer(blob.Digest, false)
		}
		if left, err := r.x.drain(t.Context()); err != nil || !left {
			t.Fatalf("left %v, %v; want that the deletion waits for the origins", left, err)
		}
		_, b, _ := r.x.buckets.For("repo")
		linked := func() {
			r.must(b.Put(t.Context(), layout.BlobKey(blob.Digest), link(blob.Digest)))
			r.must(b.Put(t.Context(), layout.LayerLink("repo", blob.Digest), link(blob.Digest))) // as an origin does
		}
		linked()
		r.owe()
		r.publish()
		if _, err := b.Stat(t.Context(), layout.LayerLink("repo", blob.Digest)); !errors.Is(err, bucket.ErrNotFound) {
			t.Errorf("the link stays: %v", err)
		}
		linked() // and if it comes later still
		for _, database := range []string{"third.db", "fourth.db"} {
			r.onlyBucket(database)
			r.wantLayer(blob.Digest, false)
			r.publish()
		}
	}
}

// A write that reaches the bucket late, after what was changed later, changes nothing.
func TestLateWritesChangeNothing(t *testing.T) {
	r := restoredRig(t)
	late := &hold{}
	r.through(func(b bucket.Bucket) bucket.Bucket { late.Bucket = b; return late })
	r.put("v", "one")
	r.publish()
	b := r.put("v", "two")
	r.delete(registry.Reference{Digest: r.put("gone", "three")})
	r.publish()
	late.again(t) // every write once more, in the order in which they came, before the last one of each key
	r.onlyBucket("second.db")
	r.wantTag("v", b)
	r.wantTag("gone", "")
	b = r.put("v", "one")
	r.publish()
	r.onlyBucket("third.db")
	r.wantTag("v", b)
}

// hold remembers writes, to let them arrive once more.
type hold struct {
	bucket.Bucket
	mu   sync.Mutex
	puts []func(context.Context) error
}

func (h *hold) Put(ctx context.Context, key string, r io.Reader) error {
	raw, err := io.ReadAll(r)
	if err != nil {
		return err
	}
	put := func(ctx context.Context) error { return h.Bucket.Put(ctx, key, bytes.NewReader(raw)) }
	h.mu.Lock()
	h.puts = append(h.puts, put)
	h.mu.Unlock()
	return put(ctx)
}

func (h *hold) again(t *testing.T) {
	for _, put := range h.puts {
		if err := put(t.Context()); err != nil {
			t.Error(err)
		}
	}
}

// broken fails some requests.
type broken struct {
	bucket.Bucket
	mu   sync.Mutex
	fail func(call, key string) error // unless nil, and not to fail the request
}

func (b *broken) set(fail func(call, key string) error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.fail = fail
}

func (b *broken) failure(call, key string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fail == nil {
		return nil
	}
	return b.fail(call, key)
}

func (b *broken) Stat(ctx context.Context, key string) (bucket.Object, error) {
	if err := b.failure("stat", key); err != nil {
		return bucket.Object{}, err
	}
	return b.Bucket.Stat(ctx, key)
}

func (b *broken) Open(ctx context.Context, key string, off, length int64) (io.ReadCloser, error) {
	if err := b.failure("open", key); err != nil {
		return nil, err
	}
	return b.Bucket.Open(ctx, key, off, length)
}

func (b *broken) Put(ctx context.Context, key string, r io.Reader) error {
	if err := b.failure("put", key); err != nil {
		return err
	}
	return b.Bucket.Put(ctx, key, r)
}

func (b *broken) List(ctx context.Context, prefix, after string, fn func(bucket.Object) error) error {
	if err := b.failure("list", prefix); err != nil {
		return err
	}
	return b.Bucket.List(ctx, prefix, after, func(o bucket.Object) error {
		if err := b.failure("listed", o.Key); err != nil {
			return err
		}
		return fn(o)
	})
}

// A restore that is cut goes on where it stopped, also in another process. Meanwhile a name that is asked for is looked
// up first: what it is, and that it is not there, are answered truly. Lists are 503.
func TestRestoreGoesOnWhereItStopped(t *testing.T) {
	r := newRig(t)
	r.buckets = memory(t)
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	r.durable(true)
	const images = 100
	r.images(images)
	r.publish()
	cut := &broken{}
	opened := map[string]int{}
	r.buckets = r.buckets.Wrap(func(_ string, b bucket.Bucket) bucket.Bucket { cut.Bucket = b; return cut })
	listed := 0
	cut.set(func(call, key string) error {
		switch {
		case call == "open":
			opened[key]++
		case call == "listed" && key > layout.RepositoriesRoot+"team-5":
			if listed++; listed > 100 {
				return bucket.ErrUnavailable
			}
		}
		return nil
	})
	r.start("second.db")
	r.x.sweepPart = 200
	if err := r.x.fill(t.Context()); !errors.Is(err, bucket.ErrUnavailable) {
		t.Fatalf("restore: %v", err)
	}
	cut.set(func(call, key string) error {
		if call == "open" {
			opened[key]++
		}
		return nil
	})
	last := fmt.Sprintf("v%d", images-1)
	m, err := r.x.GetManifest(t.Context(), "team-19/repo", registry.Reference{Tag: last}, registry.GetOptions{})
	if err != nil {
		t.Errorf("a tag that was not restored yet: %v", err)
	}
	if _, err := r.x.getLayer(t.Context(), "team-19/repo", digest.FromString(fmt.Sprintf("image %d layer 3", images-1))); err != nil {
		t.Errorf("a membership that was not restored yet: %v", err)
	}
	if _, err := r.x.GetManifest(t.Context(), "team-19/repo", registry.Reference{Tag: "none"}, registry.GetOptions{}); !errors.Is(err, registry.ErrManifestUnknown) {
		t.Errorf("a tag that nobody pushed: %v", err)
	}
	if _, err := r.x.ListTags(t.Context(), "team-19/repo", registry.Page{N: -1}); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("a list: %v", err)
	}
	r.start("second.db")
	r.x.sweepPart = 200
	r.must(r.x.fill(t.Context()))
	twice := 0
	for key, n := range opened {
		if n > 1 && key != layout.BlobKey(m.Digest) && key != layout.MediaTypeKey(m.Digest) {
			twice++
		}
	}
	if len(opened) != 2*images+2 || twice > images/2 {
		t.Errorf("%d objects were read, %d of them twice; want %d, and two of the tag that nobody pushed", len(opened), twice, 2*images)
	}
	tags := 0
	for i := range 20 {
		page, err := r.x.ListTags(t.Context(), fmt.Sprintf("team-%d/repo", i), registry.Page{N: -1})
		r.must(err)
		tags += len(page.Names)
	}
	if tags != images {
		t.Errorf("%d tags, want %d", tags, images)
	}
}

// A bucket that is down stops the names of the other one neither on their way into it nor at a restore.
func TestBucketsAreIndependent(t *testing.T) {
	r := newRig(t)
	r.two = true
	r.start("first.db")
	r.must(r.x.fill(t.Context()))
	r.durable(true)
	down := func() {
		r.x.buckets = r.x.buckets.Wrap(func(name string, b bucket.Bucket) bucket.Bucket {
			if name == "other" {
				return &broken{Bucket: b, fail: func(string, string) error { return bucket.ErrUnavailable }}
			}
			return b
		})
	}
	down()
	r.queue("other/repo", "v", layered(t, digest.FromString("{}")))
	a := r.put("v", "one")
	if left, err := r.x.drain(t.Context()); err == nil || !left {
		t.Errorf("left %v, %v; want that the other bucket's row waits", left, err)
	}
	rows, err := r.x.db.Outbox(t.Context(), names.AllBuckets, 0, 10)
	if err != nil || len(rows) != 1 || rows[0].Record.Repository != "other/repo" {
		t.Errorf("%d rows wait, %v; want the other bucket's", len(rows), err)
	}
	r.start("second.db")
	down()
	if err := r.x.fill(t.Context()); err == nil {
		t.Error("all is restored, with a bucket that is down")
	}
	if _, err := r.x.ListTags(t.Context(), "repo", registry.Page{N: -1}); err != nil {
		t.Errorf("tags in the bucket that answers: %v", err)
	}
	r.wantTag("v", a)
	if _, err := r.x.ListTags(t.Context(), "other/nothing", registry.Page{N: -1}); !errors.Is(err, registry.ErrUnavailable) {
		t.Errorf("tags in the bucket that is down: %v", err)
	}
}

// A bucket that does not exist is told in true words.
func TestBucketThatDoesNotExist(t *testing.T) {
	r := restoredRig(t)
	r.through(func(b bucket.Bucket) bucket.Bucket {
		return &broken{Bucket: b, fail: func(call, _ string) error { return fmt.Errorf("%s: %w", call, bucket.ErrNotFound) }}
	})
	r.put("v", "one")
	_, err := r.x.drain(t.Context())
	r.x.lanes[0].report(t.Context(), err)
	s, serr := r.x.status(t.Context())
	r.must(serr)
	if !errors.Is(err, errNoBucket) || s.Error == "" || s.SetAsideCount != 0 {
		t.Errorf("%v, /writeback says %+v", err, s)
	}
	if err := r.x.lanes[0].check(t.Context()); !errors.Is(err, errNoBucket) {
		t.Errorf("readiness says %v", err)
	}
}
