package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// metainfo is the sidecar of a blob on this disk, computed when it is missing.
func (o *Origin) metainfo(ctx context.Context, d digest.Digest) (*blob.Metainfo, error) {
	if m, err := o.store.Metainfo(d); err == nil {
		o.swarm.Register(m)
		return m, nil
	}
	if _, err := o.store.Stat(d); err != nil {
		return nil, wire(err)
	}
	ch := o.hashing.DoChan(d.String(), func() (any, error) {
		var m *blob.Metainfo
		var err error
		if over := o.shared(ctx, func(ctx context.Context) { m, err = o.store.ComputeMetainfo(ctx, d) }); over != nil || err != nil {
			return nil, errors.Join(over, err)
		}
		o.swarm.Register(m)
		return m, nil
	})
	select {
	case r := <-ch:
		if r.Err != nil {
			return nil, wire(r.Err)
		}
		return r.Val.(*blob.Metainfo), nil
	case <-ctx.Done():
		return nil, &registry.RetryError{Err: fmt.Errorf("%w: metainfo of %s is being computed", registry.ErrUnavailable, d), After: time.Second, Expected: true}
	}
}

// findMetainfo answers other roles: from this disk, from another origin that has the blob, or with the bucket's copy.
func (o *Origin) findMetainfo(ctx context.Context, repo string, d digest.Digest) (*blob.Metainfo, error) {
	m, err := o.metainfo(ctx, d)
	if err == nil || !errors.Is(err, registry.ErrBlobUnknown) {
		return m, err
	}
	if o.inFlight(ctx, repo, d) != nil {
		return nil, isArriving(d)
	}
	or, _, unsure := o.elsewhere(ctx, repo, d)
	if or != nil {
		if o.origins.Ring().Owns(o.cfg.ID, d) { // this owner has lost it, or never had it
			o.Background(func(ctx context.Context) { o.copyFrom(ctx, or, repo, d) })
		}
		// It has the blob on its disk, so it asks nobody else.
		m, err := or.Metainfo(ctx, repo, d)
		if err == nil {
			return m, nil
		}
		unsure = append(unsure, fmt.Errorf("origin %s: %w", or.ID, err))
	}
	if up, isUpstream := o.upstreamOf(ctx, repo); isUpstream {
		if said := o.lately(up.question(d)); said != nil {
			err := o.besideUpstream(ctx, up, repo, d)
			if err != nil && !errors.Is(err, bucket.ErrNotFound) {
				unsure = append(unsure, err)
			}
			if err != nil {
				return nil, o.unlessUnsure(d, unsure, said)
			}
		}
		// Who asks for it will ask for the bytes next.
		presented := cluster.Authorization(ctx)
		o.Background(func(ctx context.Context) {
			ctx = cluster.WithAuthorization(ctx, presented)
			if _, err := o.arriving(ctx, repo, d, cluster.ArrivingRequest{}); err != nil {
				o.log.Debug("a blob whose metainfo was asked for does not arrive", "digest", d, "error", err)
			}
		})
		return nil, isArriving(d)
	}
	b, _, err := o.inBucket(ctx, repo, d)
	if err != nil {
		return nil, o.missing(d, unsure, err)
	}
	if _, err := o.readThrough(ctx, repo, d); err != nil {
		return nil, o.missing(d, unsure, err)
	}
	r, err := b.Open(ctx, layout.MetainfoKey(d), 0, -1)
	if err != nil {
		return nil, &registry.RetryError{Err: fmt.Errorf("%w: metainfo of %s: %w", registry.ErrUnavailable, d, err), After: time.Second}
	}
	defer r.Close()
	raw, err := io.ReadAll(io.LimitReader(r, blob.MaxMetainfo+1))
	if err == nil {
		m, err = blob.ParseMetainfo(raw)
	}
	if err != nil || m.Digest != d {
		return nil, &registry.RetryError{Err: fmt.Errorf("%w: metainfo of %s in the bucket is unusable: %w", registry.ErrUnavailable, d, err), After: time.Second}
	}
	return m, nil
}

// isArriving is the answer about a blob that is on its way here: GET arriving says more.
func isArriving(d digest.Digest) error {
	return &registry.RetryError{Err: fmt.Errorf("%w: %s is arriving", registry.ErrUnavailable, d), After: time.Second, Expected: true}
}

// metainfoRoute answers other roles with metainfo, and takes an operator's, or an older agent's, word that it is wrong.
func (o *Origin) metainfoRoute(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error {
	switch r.Method {
	case http.MethodGet:
		ctx, cancel := context.WithTimeout(r.Context(), otherPatience+cluster.Stall/4) // less than who asks has
		defer cancel()
		m, err := o.findMetainfo(ctx, repo, d)
		if err != nil {
			return err
		}
		b := m.Marshal()
		w.Header().Set("Content-Type", "application/x-bittorrent")
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		_, err = w.Write(b)
		return ignoreWrite(err)
	case http.MethodDelete:
		if err := o.doubtMetainfo(d, sourceOf(r)); err != nil {
			return err
		}
		w.WriteHeader(http.StatusAccepted)
		return nil
	}
	return fmt.Errorf("%w: %s metainfo", registry.ErrUnsupported, r.Method)
}
