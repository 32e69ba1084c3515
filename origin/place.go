package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// copyFrom heals an owner that lacks a blob which another origin has.
func (o *Origin) copyFrom(ctx context.Context, or *cluster.Origin, repo string, d digest.Digest) {
	if _, again := o.busy.LoadOrStore(d, true); again {
		return
	}
	defer o.busy.Delete(d)
	c, err := or.LocalOpen(ctx, repo, d, registry.Whole)
	if err == nil {
		_, err = o.store.Ingest(ctx, d, c.Size, c.Body, nil)
		c.Close()
	}
	if err != nil {
		o.log.Info("blob was not copied from another origin", "digest", d, "origin", or.ID, "error", err)
		return
	}
	o.committed(d)
}

// spread sees to it that every other owner has a copy: one may have been down when the blob was pushed.
func (o *Origin) spread(ctx context.Context, d digest.Digest, m store.Marker) error {
	var errs []error
	for _, or := range o.origins.Owners(d) {
		if or.ID == o.cfg.ID {
			continue
		}
		if err := o.give(ctx, or, d, m); err != nil {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// give copies the blob to an origin that lacks it, with the debt to the bucket.
func (o *Origin) give(ctx context.Context, or *cluster.Origin, d digest.Digest, m store.Marker) error {
	repo := m.Repositories[0]
	_, err := or.LocalStat(ctx, repo, d)
	if err == nil {
		return nil
	}
	if !errors.Is(err, registry.ErrBlobUnknown) {
		return fmt.Errorf("ask %s for %s: %w", or.ID, d, err)
	}
	for _, repo := range m.Repositories {
		c, err := o.local(d)
		if err != nil {
			return err
		}
		err = or.Replicate(ctx, repo, d, c.Size, true, c.Reader())
		c.Close()
		if err != nil {
			return fmt.Errorf("copy %s to %s: %w", d, or.ID, err)
		}
	}
	o.m.replicated.Inc()
	return nil
}

// moveToOwners gives a blob that was pushed before its digest was known to those whose it is, then drops it here. Until
// then this origin keeps it, and lookups find it by walking the rendezvous order.
func (o *Origin) moveToOwners(ctx context.Context, d digest.Digest, m store.Marker) (wait time.Duration, err error) {
	if len(m.Repositories) == 0 {
		return 0, fmt.Errorf("marker of %s names no repository", d)
	}
	if err := o.spread(ctx, d, m); err != nil {
		return 0, err
	}
	// Two others have it now, and owe it to the bucket.
	for _, target := range slices.Clone(m.Targets) {
		if err := o.store.Unmark(d, m, target); err != nil {
			return 0, err
		}
	}
	if err := o.DeleteBlob(ctx, "", d); err != nil && !errors.Is(err, registry.ErrUnsupported) {
		return 0, err
	}
	return 0, nil
}

// replicate takes a copy from another origin.
func (o *Origin) replicate(ctx context.Context, repo string, d digest.Digest, size int64, owed bool, r io.Reader) (fresh bool, err error) {
	var m *store.Marker
	if owed {
		mk, err := o.marker(repo)
		if err != nil {
			return false, err
		}
		m = &mk
	}
	_, err = o.store.Stat(d)
	fresh = err != nil
	if _, err := o.store.Ingest(ctx, d, size, r, m); err != nil {
		return false, wire(err)
	}
	o.committed(d)
	return fresh, nil
}

// blobRoute serves the blobs of this origin's disk to other origins and to proxies, and takes copies of theirs.
func (o *Origin) blobRoute(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error {
	switch r.Method {
	case http.MethodHead:
		i, err := o.store.Stat(d)
		if err != nil {
			return wire(err)
		}
		w.Header().Set("Content-Length", strconv.FormatInt(i.Size, 10))
		w.Header().Set("Docker-Content-Digest", d.String())
		w.WriteHeader(http.StatusOK)
		return nil
	case http.MethodGet:
		c, err := o.local(d)
		if err != nil {
			return err
		}
		return registry.ServeContent(w, r, c)
	case http.MethodPut:
		fresh, err := o.replicate(r.Context(), repo, d, r.ContentLength, isTrue(r.Header.Get("Kraken-Writeback")), r.Body)
		if err != nil {
			return err
		}
		if fresh {
			w.WriteHeader(http.StatusCreated)
		}
		return nil
	}
	return fmt.Errorf("%w: %s blobs", registry.ErrUnsupported, r.Method)
}
