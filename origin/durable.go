package origin

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// durableIn answers which digests are in the bucket of a repository, verified. Of an object that the bucket keeps no
// digest of, this is known a while after the first question.
func (o *Origin) durableIn(ctx context.Context, repo string, ds []digest.Digest) (cluster.DurableResponse, error) {
	var out cluster.DurableResponse
	name, b, ok := o.buckets.For(repo)
	if !ok {
		return out, fmt.Errorf("%w: no bucket is configured for repository %s", registry.ErrDenied, repo)
	}
	for _, d := range ds {
		if m, err := o.store.Marker(d); err == nil && slices.Contains(m.Targets, name) {
			out.Pending = append(out.Pending, d)
			continue
		}
		key := name + " " + d.String()
		right, known := o.durable.Get(key)
		if right {
			out.Durable = append(out.Durable, d)
			continue
		}
		obj, err := b.Stat(ctx, layout.BlobKey(d))
		switch {
		case err == nil && obj.Digest == d:
			o.durable.Add(key, true)
			out.Durable = append(out.Durable, d)
		case err == nil:
			if !known {
				o.checkInBucket(key, b, d, obj.Size)
			}
			out.Unknown = append(out.Unknown, d) // who asks asks again
		case errors.Is(err, bucket.ErrNotFound):
			out.Unknown = append(out.Unknown, d)
		default:
			return out, fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
		}
	}
	return out, nil
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
