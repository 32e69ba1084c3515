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

// durableIn answers which digests are in the bucket of a repository.
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
		if _, ok := o.durable.Get(key); ok {
			out.Durable = append(out.Durable, d)
			continue
		}
		_, err := b.Stat(ctx, layout.BlobKey(d))
		switch {
		case err == nil:
			o.durable.Add(key, true)
			out.Durable = append(out.Durable, d)
		case errors.Is(err, bucket.ErrNotFound):
			out.Unknown = append(out.Unknown, d)
		default:
			return out, fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
		}
	}
	return out, nil
}

func (o *Origin) durableRoute(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
	if r.Method != http.MethodPost {
		return fmt.Errorf("%w: %s durable", registry.ErrUnsupported, r.Method)
	}
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
