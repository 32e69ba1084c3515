package origin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"kraken/origin/bucket"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

const (
	// durableFor is how long the bucket is asked for one question: less than who asks takes for silence.
	durableFor = time.Second
	statsOnce  = 16 // requests of one question at the same time
)

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
	if len(ask) > 0 && !o.monitor.Up(name) {
		return out, fmt.Errorf("%w: bucket %s: %w", registry.ErrUnavailable, name, errBucketDown)
	}
	limit, cancel := context.WithTimeout(ctx, durableFor)
	defer cancel()
	there := make([]bool, len(ask))
	g, each := errgroup.WithContext(limit)
	g.SetLimit(statsOnce)
	for i, d := range ask {
		g.Go(func() (err error) {
			if limit.Err() == nil {
				there[i], err = o.isInBucket(each, name, b, d)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil && limit.Err() == nil {
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
