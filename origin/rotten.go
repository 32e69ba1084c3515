package origin

import (
	"context"
	"errors"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/cluster"
)

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
	o.mu.Lock()
	delete(o.retry, d)
	o.mu.Unlock()
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
