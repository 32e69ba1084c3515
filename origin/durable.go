package origin

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	"kraken/origin/bucket"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

const (
	// durableFor is how long the bucket is waited for with one question: less than who asks takes for silence.
	durableFor = time.Second
	looksOnce  = 32 // requests to one bucket at the same time
)

// looks are the requests that buckets are asked what they have with.
type looks struct {
	mu    sync.Mutex
	under map[string]*look         // "bucket digest" → under way
	slots map[string]chan struct{} // of each bucket
	log   rate.Sometimes
}

// look is one of them, for all who ask the same. It belongs to the origin: one that outlasts a question is an answer to
// the next.
type look struct {
	done  chan struct{} // closed when the rest is known
	there bool
	err   error // the bucket is down
}

// join returns the look for a key that is under way, or a new one: then it is mine, to be ended.
func (l *looks) join(key string) (_ *look, mine bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if x := l.under[key]; x != nil {
		return x, false
	}
	if l.under == nil {
		l.under = map[string]*look{}
	}
	x := &look{done: make(chan struct{})}
	l.under[key] = x
	return x, true
}

func (l *looks) end(key string, x *look) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.under, key)
	close(x.done)
}

// of returns the slots of a bucket.
func (l *looks) of(name string) chan struct{} {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.slots == nil {
		l.slots = map[string]chan struct{}{}
	}
	if l.slots[name] == nil {
		l.slots[name] = make(chan struct{}, looksOnce)
	}
	return l.slots[name]
}

// durableIn answers which digests are in the bucket of a repository, verified. Of an object that the bucket keeps no
// digest of, and of what the bucket did not answer within a second, this is known a while after the first question.
func (o *Origin) durableIn(ctx context.Context, repo string, ds []digest.Digest) (cluster.DurableResponse, error) {
	var out cluster.DurableResponse
	name, b, ok := o.buckets.For(repo)
	if !ok {
		return out, fmt.Errorf("%w: no bucket is configured for repository %s", registry.ErrDenied, repo)
	}
	var ask []digest.Digest
	for _, d := range ds {
		if m, err := o.store.Marker(d); err == nil && slices.Contains(m.Targets, name) {
			out.Pending = append(out.Pending, d)
		} else if right, _ := o.durable.Get(name + " " + d.String()); right {
			out.Durable = append(out.Durable, d)
		} else {
			ask = append(ask, d)
		}
	}
	if len(ask) == 0 {
		return out, nil
	}
	if !o.monitor.Up(name) {
		return out, fmt.Errorf("%w: bucket %s: %w", registry.ErrUnavailable, name, errBucketDown)
	}
	there, err := o.lookFor(ctx, name, b, ask)
	if err != nil {
		return out, fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
	}
	for i, d := range ask {
		if there[i] {
			out.Durable = append(out.Durable, d)
		} else {
			out.Unknown = append(out.Unknown, d) // who asks asks again
		}
	}
	return out, nil
}

// lookFor reports of which blobs a bucket said, within durableFor, that it has them. The error is that the bucket is
// down: what it does not tell of one blob is unknown of that one.
func (o *Origin) lookFor(ctx context.Context, name string, b bucket.Bucket, ds []digest.Digest) ([]bool, error) {
	limit, cancel := context.WithTimeout(ctx, durableFor)
	defer cancel()
	under, there := make([]*look, len(ds)), make([]bool, len(ds))
	from := rand.IntN(len(ds)) // what a slow bucket lacks must not keep it from being asked for the rest
	for n := 0; n < len(ds) && limit.Err() == nil; n++ {
		i := (from + n) % len(ds)
		under[i] = o.look(limit, name, b, ds[i])
	}
	for i, l := range under {
		if l == nil {
			continue
		}
		select {
		case <-l.done:
		case <-limit.Done():
		}
		select {
		case <-l.done:
			if l.err != nil {
				return nil, l.err
			}
			there[i] = l.there
		default:
		}
	}
	return there, nil
}

// look begins to look for a blob in a bucket, unless somebody does: once for all who ask. It waits for a slot, no
// longer than limit; what has begun goes on after it.
func (o *Origin) look(limit context.Context, name string, b bucket.Bucket, d digest.Digest) *look {
	key, slots := name+" "+d.String(), o.looks.of(name)
	l, mine := o.looks.join(key)
	if !mine {
		return l
	}
	if l.there, _ = o.durable.Get(key); l.there { // one has ended since
		o.looks.end(key, l)
		return l
	}
	select {
	case slots <- struct{}{}:
	case <-limit.Done():
		o.looks.end(key, l)
		return l
	}
	end := func() {
		<-slots
		o.looks.end(key, l)
	}
	begun := o.Background(func(ctx context.Context) {
		defer end()
		var err error
		l.there, err = o.isInBucket(ctx, name, b, d)
		switch {
		case err == nil || ctx.Err() != nil:
		case o.monitor.Failed(ctx, name, err):
			l.err = fmt.Errorf("bucket %s: %w: %w", name, errBucketDown, err)
		default:
			o.looks.log.Do(func() {
				o.log.Warn("the bucket does not tell whether it has a blob; what refers to it is not written", "bucket", name, "digest", d, "error", err)
			})
		}
	})
	if !begun {
		end()
	}
	return l
}

// isInBucket reports whether a bucket has a blob, by the digest that it keeps with the object. Of an object without one
// it begins to find out.
func (o *Origin) isInBucket(ctx context.Context, name string, b bucket.Bucket, d digest.Digest) (bool, error) {
	key := name + " " + d.String()
	obj, err := b.Stat(ctx, layout.BlobKey(d))
	switch {
	case errors.Is(err, bucket.ErrNotFound):
		return false, nil
	case err != nil:
		return false, err
	case obj.Digest == d:
		o.durable.Add(key, true)
		return true, nil
	}
	if _, known := o.durable.Get(key); !known {
		o.checkInBucket(key, b, d, obj.Size)
	}
	return false, nil
}

// checkInBucket reads and hashes an object in the background, once for all who ask, and notes that it is right.
func (o *Origin) checkInBucket(key string, b bucket.Bucket, d digest.Digest, size int64) {
	if _, busy := o.checking.LoadOrStore(key, true); busy {
		return
	}
	o.Background(func(ctx context.Context) {
		defer o.checking.Delete(key)
		select {
		case o.checks <- struct{}{}:
			defer func() { <-o.checks }()
		case <-ctx.Done():
			return
		}
		switch right, err := hasVerified(ctx, b, d, size); {
		case err != nil:
			o.log.Info("an object of the bucket was not verified", "digest", d, "error", err)
		case right:
			o.durable.Add(key, true)
		default:
			o.durable.Add(key, false) // until one with a digest is in its place
			o.log.Warn("the bucket has other bytes under a digest; the next push of the blob replaces them", "digest", d)
		}
	})
}

func (o *Origin) durableRoute(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
	var q cluster.DurableRequest
	if err := decode(r, cluster.MaxDurableDigests*160, &q); err != nil {
		return err
	}
	if len(q.Digests) > cluster.MaxDurableDigests {
		return fmt.Errorf("%w: %d digests, at most %d", errBody, len(q.Digests), cluster.MaxDurableDigests)
	}
	for _, d := range q.Digests {
		if _, err := blob.ParseDigest(d.String()); err != nil {
			return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
		}
	}
	out, err := o.durableIn(r.Context(), x.Repository, q.Digests)
	if err != nil {
		return err
	}
	return transport.WriteJSON(w, http.StatusOK, out)
}
