package buildindex

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// layered is an image manifest whose layers are these digests; its config is the first.
func layered(t testing.TB, layers ...digest.Digest) []byte {
	t.Helper()
	var ds []v1.Descriptor
	for _, d := range layers {
		ds = append(ds, v1.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: 2})
	}
	b, err := json.Marshal(map[string]any{
		"schemaVersion": 2, "mediaType": v1.MediaTypeImageManifest, "config": ds[0], "layers": ds,
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func distinct(n int) (out []digest.Digest) {
	for i := range n {
		out = append(out, digest.FromString(fmt.Sprintf("layer %d", i)))
	}
	return out
}

func repeated(n int) (out []digest.Digest) {
	for range n {
		out = append(out, digest.FromString("{}"))
	}
	return out
}

// queue puts a manifest into SQL and the outbox past every check, as an older version may have.
func (r *rig) queue(repo, tag string, raw []byte) digest.Digest {
	r.Helper()
	p, err := parseManifest("", raw)
	r.must(err)
	rec, err := r.x.record(cluster.PutTag(repo, tag, digest.FromBytes(raw)))
	r.must(err)
	rec.MediaType, rec.Size, rec.Bytes = p.mediaType, int64(len(raw)), raw
	r.must(r.x.db.Update(r.Context(), func(tx names.Tx) error { return errors.Join(r.x.apply(tx, rec, p), r.x.enqueue(tx, rec)) }))
	return rec.Digest
}

// One manifest with very many references, which an older version took, must neither stop other names nor stay behind
// itself.
func TestManyReferencesStopNobody(t *testing.T) {
	r := newRig(t)
	r.durable(true)
	r.queue("repo", "big", layered(t, repeated(22_000)...))
	r.put("v", "one")
	if left, err := r.x.drain(t.Context()); err != nil || left {
		t.Errorf("left %v, %v", left, err)
	}
	if s, err := r.x.db.State(t.Context()); err != nil || s.OutboxRows != 0 {
		t.Errorf("%d changes stay in the outbox, %v", s.OutboxRows, err)
	}
	// one of two origins is asked for more than it takes
	many := distinct(2*cluster.MaxDurableDigests + 1)
	if got, err := r.x.durable(t.Context(), "repo", many); err != nil || len(got) != len(many) {
		t.Errorf("%d of %d are durable, %v", len(got), len(many), err)
	}
}

// A push names at most as many references as are of use; duplicates count.
func TestReferencesAreBounded(t *testing.T) {
	r := newRig(t)
	r.x.cfg.Repositories = []Policy{{Match: "repo", References: "lax"}}
	r.must(r.x.cfg.Validate())
	for _, layers := range [][]digest.Digest{distinct(10_001), repeated(22_000)} {
		_, err := r.push("repo", registry.Reference{Tag: "v"}, layered(t, layers...), registry.PutOptions{})
		if !errors.Is(err, registry.ErrManifestInvalid) || !strings.Contains(err.Error(), "references") {
			t.Errorf("%d layers: %v", len(layers), err)
		}
	}
	if _, err := r.push("repo", registry.Reference{Tag: "v"}, layered(t, distinct(1_000)...), registry.PutOptions{}); err != nil {
		t.Error(err)
	}
}

// A row that can't be written for a reason of its own is shown by name, tried again later, and no other waits for it.
func TestOneBadRowStopsNobody(t *testing.T) {
	r := newRig(t)
	r.durable(true)
	buckets, err := bucket.OpenAll(t.Context(), []bucket.Config{{Name: "b", URL: r.x.cfg.Buckets[0].URL, Repositories: "repo"}}, nil)
	r.must(err)
	r.x.buckets = buckets // another repository has none any more
	bad := r.queue("gone/away", "v", layered(t, digest.FromString("{}")))
	good := r.put("v", "one")
	if _, err := r.x.drain(t.Context()); err != nil {
		t.Errorf("drain: %v", err)
	}
	if s, err := r.x.db.State(t.Context()); err != nil || s.OutboxRows != 1 {
		t.Fatalf("%d changes in the outbox, %v; want the bad one", s.OutboxRows, err)
	}
	s, err := r.x.status(t.Context())
	r.must(err)
	if len(s.SetAside) != 1 || s.SetAside[0].Repository != "gone/away" || s.SetAside[0].Tag != "v" || s.SetAside[0].Digest != bad || s.SetAside[0].Error == "" {
		t.Errorf("/writeback shows %+v", s)
	}
	r.lose()
	r.wantTag("v", good)
}

// puts counts what is written to a bucket, by key.
type puts struct {
	bucket.Bucket
	mu  sync.Mutex
	all map[string]int
}

func (p *puts) Put(ctx context.Context, key string, r io.Reader) error {
	p.mu.Lock()
	p.all[key]++
	p.mu.Unlock()
	return p.Bucket.Put(ctx, key, r)
}

// A manifest is written once for all tags that it was pushed with.
func TestManyTagsWriteOneManifest(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	r.durable(true)
	b := &puts{all: map[string]int{}}
	r.through(func(real bucket.Bucket) bucket.Bucket { b.Bucket = real; return b })
	raw := layered(t, distinct(40)...)
	for i := range 10 {
		r.queue("repo", fmt.Sprintf("v%d", i), raw)
	}
	if left, err := r.x.drain(t.Context()); err != nil || left {
		t.Fatal(left, err)
	}
	d := digest.FromBytes(raw)
	for _, key := range []string{layout.BlobKey(d), layout.RevisionLink("repo", d)} {
		if b.all[key] != 1 {
			t.Errorf("%s was written %d times", key, b.all[key])
		}
	}
	for i := range 10 {
		if key := layout.TagCurrentLink("repo", fmt.Sprintf("v%d", i)); b.all[key] != 1 {
			t.Errorf("%s was written %d times", key, b.all[key])
		}
	}
}

// A bucket that takes names is not taken for one that is away, although the backlog of its outage is not written yet.
func TestBucketThatIsBack(t *testing.T) {
	r := newRig(t)
	r.durable(true)
	r.must(r.x.fill(t.Context()))
	l := r.x.lanes[0]
	l.state = bucket.Down
	if !r.x.bucketIsAway("repo") {
		t.Fatal("a bucket that is down is not away")
	}
	r.put("v", "one")
	rows, err := r.x.db.Outbox(t.Context(), l.name, 0, 1)
	r.must(err)
	r.must((&batch{lane: l, rows: rows}).run(t.Context()))
	if r.x.bucketIsAway("repo") {
		t.Error("a bucket that has taken a name is away")
	}
}

// What is said of a bucket that does not answer, or is missing, is what it said, also where there is nothing to write
// to it, and nothing that could be. It is known to be away then: a change that too few origins keep is taken back.
func TestBucketThatIsNotWrittenTo(t *testing.T) {
	for _, queued := range []bool{false, true} {
		for want, err := range map[bucket.Condition]error{bucket.Down: bucket.ErrUnavailable, bucket.Missing: fmt.Errorf("%w: %w", bucket.ErrUnavailable, bucket.ErrMissing)} {
			t.Run(fmt.Sprintf("%s, something waits: %t", want, queued), func(t *testing.T) {
				r := newRig(t)
				r.must(r.x.fill(t.Context()))
				if queued {
					r.put("v", "one")
				}
				b := &broken{fail: func(string, string) error { return err }}
				r.through(func(real bucket.Bucket) bucket.Bucket { b.Bucket = real; return b })
				l := r.x.lanes[0]
				says := func() (string, error) {
					s, err := r.x.status(t.Context())
					r.must(err)
					return s.Buckets[0].State, l.check(t.Context())
				}
				if _, err := l.turn(t.Context()); err == nil {
					t.Error("a turn says nothing of it")
				}
				if s, err := says(); s != string(want) || err == nil {
					t.Errorf("it is %q, readiness says %v", s, err)
				}
				r.origins[1].set(func() { r.origins[1].down = true })
				_, err := r.push("repo", registry.Reference{Tag: "w"}, raw("", "a/w"), registry.PutOptions{})
				if !errors.Is(err, registry.ErrUnavailable) || errors.Is(err, registry.ErrTooFewCopies) {
					t.Errorf("a push that one origin keeps: %v", err)
				}
				r.wantTag("w", "")
				r.origins[1].set(func() { r.origins[1].down = false })
				b.set(nil)
				if _, err := l.turn(t.Context()); err != nil {
					t.Errorf("it is back: %v", err)
				}
				if s, err := says(); s != string(bucket.Ready) || err != nil {
					t.Errorf("it is back, and %q, readiness says %v", s, err)
				}
				for _, o := range r.origins {
					o.set(func() { o.down = true })
				}
				if _, err := l.turn(t.Context()); (err != nil) != queued {
					t.Errorf("without origins: %v", err)
				}
				if s, err := says(); s != string(bucket.Ready) || (err != nil) != queued {
					t.Errorf("without origins it is %q, readiness says %v", s, err)
				}
			})
		}
	}
}
