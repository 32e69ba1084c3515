package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// copyFrom heals an owner that lacks a blob which another origin has. What the other owes the bucket is owed here, too.
func (o *Origin) copyFrom(ctx context.Context, or *cluster.Origin, repo string, d digest.Digest) {
	if _, again := o.busy.LoadOrStore(d, true); again {
		return
	}
	defer o.busy.Delete(d)
	m, err := o.debtOf(ctx, or, repo, d)
	if err == nil {
		err = o.copyWithDebt(ctx, or, repo, d, m)
	}
	if err != nil {
		o.log.Info("blob was not copied from another origin", "digest", d, "origin", or.ID, "error", err)
		return
	}
	o.committed(d)
}

// copyWithDebt copies a blob from another origin's disk to this one, with a debt where m is not nil.
func (o *Origin) copyWithDebt(ctx context.Context, or *cluster.Origin, repo string, d digest.Digest, m *store.Marker) error {
	if !or.Answers() {
		return fmt.Errorf("origin %s: %w", or.ID, errNotAsked)
	}
	c, err := or.LocalOpen(transport.WithProgressTimeout(ctx, readStall), repo, d, registry.Whole)
	if err != nil {
		return o.heard(or, err)
	}
	defer c.Close()
	_, err = o.store.Ingest(ctx, d, c.Size, c.Reader(), m)
	return err
}

// spread makes every other owner owe a blob that this origin owes: one may have been down when the blob was pushed, or
// have a copy without the debt. leaving says that this one drops its copy then.
func (o *Origin) spread(ctx context.Context, d digest.Digest, m store.Marker, leaving bool) error {
	if len(m.Repositories) == 0 {
		return fmt.Errorf("marker of %s names no repository", d)
	}
	var errs []error
	for _, or := range o.origins.Owners(d) {
		if or.ID == o.cfg.ID {
			continue
		}
		if err := o.handOver(ctx, or, d, m, leaving); err != nil {
			errs = append(errs, err)
		}
	}
	return trouble(errs)
}

// trouble joins errors. Those that only ask to come back are left out when there are others, so that isLater holds for
// what it returns when nobody had any trouble.
func trouble(errs []error) error {
	if others := slices.DeleteFunc(slices.Clone(errs), isLater); len(others) > 0 {
		return errors.Join(others...)
	}
	return errors.Join(errs...)
}

// moveToOwners hands a blob that was pushed before its digest was known over to those whose it is, then drops it here.
// Until all of them owe it this origin keeps it, and lookups find it by walking the rendezvous order. They hash their
// copies last, once each: while one is away this origin asks again and again.
func (o *Origin) moveToOwners(ctx context.Context, d digest.Digest, m store.Marker) error {
	for _, leaving := range []bool{false, true} {
		if err := o.spread(ctx, d, m, leaving); err != nil {
			return err
		}
	}
	for _, target := range slices.Clone(m.Targets) {
		if err := o.store.Unmark(d, m, target); err != nil {
			return err
		}
	}
	return o.leave(ctx, d)
}

// leave drops a copy that belongs elsewhere, unless it is owed again since.
func (o *Origin) leave(ctx context.Context, d digest.Digest) error {
	if err := o.DeleteBlob(ctx, "", d); err != nil && !errors.Is(err, registry.ErrUnsupported) && !errors.Is(err, registry.ErrBlobUnknown) {
		return err
	}
	return nil
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
		_, err = o.store.Marker(d)
		w.Header().Set(cluster.WritebackHeader, strconv.FormatBool(err == nil))
		w.WriteHeader(http.StatusOK)
		return nil
	case http.MethodGet:
		open := o.localWhole
		if r.Header.Get("Range") != "" {
			open = func(_ context.Context, d digest.Digest) (*registry.Content, error) { return o.local(d) }
		}
		c, err := open(r.Context(), d)
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
