package origin

import (
	"context"
	"errors"
	"net/http"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/cluster"
)

// verifyRoute takes a reader's word that a blob here, or its metainfo, is not what it should be.
func (o *Origin) verifyRoute(w http.ResponseWriter, r *http.Request, _ string, d digest.Digest) error {
	doubt := o.doubt
	if r.URL.Query().Get(cluster.DoubtOf) == cluster.DoubtMetainfo {
		doubt = o.doubtMetainfo
	}
	if err := doubt(d, sourceOf(r)); err != nil {
		return err
	}
	w.WriteHeader(http.StatusAccepted)
	return nil
}

// doubt verifies a blob in the background because source says that it is wrong, and drops a rotten one. Like doubts
// about metainfo it is followed only so often: who is right about one is listened to again at once. ErrBlobUnknown when
// this origin does not hold d.
func (o *Origin) doubt(d digest.Digest, source string) error {
	if r, err := o.store.Open(d); err != nil { // which finds a file that is gone or short
		return wire(err)
	} else {
		r.Close()
	}
	if o.Context().Err() != nil || !o.recomputing.begin(d, source) {
		return nil
	}
	o.Background(func(ctx context.Context) {
		defer o.recomputing.done()
		switch err := o.store.Scrub(ctx, d); {
		case errors.Is(err, store.ErrDigestMismatch):
			o.recomputing.right(d, source)
		case err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrNotFound):
			o.log.Warn("a blob that somebody doubts was not verified", "digest", d, "error", err)
		}
	})
	return nil
}

// dropRotten verifies a blob whose bytes somebody found to be wrong. A rotten one is dropped, and comes again from
// another origin or the bucket. Nil says that it was read and looked at, whatever came of it.
func (o *Origin) dropRotten(ctx context.Context, d digest.Digest) error {
	err := o.store.Scrub(ctx, d)
	if errors.Is(err, store.ErrDigestMismatch) || errors.Is(err, store.ErrNotFound) {
		return nil
	}
	return err
}

// rotten is told by the store of a blob that it has dropped because its bytes were wrong.
func (o *Origin) rotten(d digest.Digest) {
	o.tries.forget(d)
	if _, owed := o.store.Lost(d); owed {
		o.wake() // write-back finds the bytes elsewhere
		return
	}
	if o.origins.Ring().Owns(o.cfg.ID, d) {
		o.Background(func(ctx context.Context) { o.heal(ctx, d) })
	}
}

// heal fetches a blob that this origin owns and has lost, from another origin or from the bucket.
func (o *Origin) heal(ctx context.Context, d digest.Digest) {
	for _, or := range o.others(d) {
		o.copyFrom(ctx, or, cluster.AnyRepository, d)
		if _, err := o.store.Stat(d); err == nil || ctx.Err() != nil {
			return
		}
	}
	if _, err := o.readThrough(ctx, cluster.AnyRepository, d); err != nil {
		o.log.Warn("a blob that was rotten here was not found elsewhere yet", "digest", d, "error", err)
	}
}
