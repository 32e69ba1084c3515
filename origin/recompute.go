package origin

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/blob"
)

const (
	// recomputeEvery is how long a blob is left alone after its metainfo was recomputed.
	recomputeEvery = time.Minute
	// maxRecomputing bounds the blobs that are read at once because somebody doubts their metainfo.
	maxRecomputing = 2
	// recomputeSourceEvery is how long a source is not listened to after a recomputation of any blob that it asked for:
	// an honest one meets a wrong metainfo once in a long while.
	recomputeSourceEvery = 10 * time.Second
	// maxRecomputed bounds the digests, and the sources, of which the last recomputation is remembered.
	maxRecomputed = 10_000
)

// recomputations decides which claims of a wrong metainfo are worth a reading of the whole blob. A claim costs its
// sender one request and the origin a blob's worth of disk and hashing, so only few are followed at once, and each
// blob's once in recomputeEvery.
type recomputations struct {
	mu      sync.Mutex
	running int
	last    *simplelru.LRU[digest.Digest, time.Time] // when the last recomputation began
	sources *simplelru.LRU[string, time.Time]        // and of those that a source asked for
}

func newRecomputations() *recomputations {
	last, _ := simplelru.NewLRU[digest.Digest, time.Time](maxRecomputed, nil) // fails only for a size below one
	sources, _ := simplelru.NewLRU[string, time.Time](maxRecomputed, nil)
	return &recomputations{last: last, sources: sources}
}

// begin reports whether the metainfo of d is to be recomputed now because source asks for it. If it is, the caller
// calls done at the end.
func (r *recomputations) begin(d digest.Digest, source string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if at, known := r.sources.Get(source); known && time.Since(at) < recomputeSourceEvery {
		return false
	}
	if at, known := r.last.Get(d); known && time.Since(at) < recomputeEvery {
		return false
	}
	if r.running >= maxRecomputing {
		return false
	}
	r.running++
	r.last.Add(d, time.Now())
	r.sources.Add(source, time.Now())
	return true
}

func (r *recomputations) done() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.running--
}

// right says that source was right about d: what it and others say next is listened to at once.
func (r *recomputations) right(d digest.Digest, source string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.last.Remove(d)
	r.sources.Remove(source)
}

// doubtMetainfo takes an agent's word that all pieces of d pass and the whole fails. It returns at once: the blob is
// verified and its metainfo recomputed in the background, unless that happened a moment ago, for d or for this source,
// or enough are being read. Peers and leases go on with the old metainfo until another one is found. ErrBlobUnknown
// when this origin does not hold d.
func (o *Origin) doubtMetainfo(d digest.Digest, source string) error {
	if _, err := o.store.Stat(d); err != nil {
		return wire(err)
	}
	if o.Context().Err() != nil || !o.recomputing.begin(d, source) {
		return nil
	}
	o.Background(func(ctx context.Context) {
		defer o.recomputing.done()
		if err := o.recompute(ctx, d); err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrNotFound) {
			o.log.Warn("metainfo was not recomputed", "digest", d, "error", err)
		}
	})
	return nil
}

// recompute verifies the blob, which removes a rotten one, and replaces its metainfo where another one comes out.
func (o *Origin) recompute(ctx context.Context, d digest.Digest) error {
	if err := o.store.Scrub(ctx, d); err != nil {
		return fmt.Errorf("recompute metainfo: %w", err)
	}
	old, _ := o.store.Metainfo(d) // one that can't be read is replaced as well
	ch := o.hashing.DoChan(d.String(), func() (any, error) { return o.store.ComputeMetainfo(ctx, d) })
	r := <-ch
	if r.Err != nil {
		return fmt.Errorf("recompute metainfo: %w", r.Err)
	}
	m := r.Val.(*blob.Metainfo)
	if old == nil || old.InfoHash() != m.InfoHash() {
		o.log.Error("a metainfo was wrong and is replaced", "digest", d)
		o.swarm.Forget(d)
		o.leases.drop(d)
	}
	o.swarm.Register(m)
	return nil
}
