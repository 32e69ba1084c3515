package origin

import (
	"context"
	"errors"
	"time"

	"github.com/jellydator/ttlcache/v3"
	"golang.org/x/sync/singleflight"

	"kraken/origin/upstream"
	"kraken/proto/registry"
)

// answers are what upstreams said of blobs lately, so that many who ask cost an upstream one request. It is safe for
// concurrent use.
type answers struct {
	flights singleflight.Group // of questions about a size
	asking  *upstream.Budget   // of questions under way
	sizes   *ttlcache.Cache[question, int64]
	noes    *ttlcache.Cache[question, error] // "not there" and "not allowed", for the registry's negative_ttl
}

const (
	// sizesFor is how long a size is told without asking: a digest's is always the same, but it may be deleted.
	sizesFor = time.Minute
	// maxAnswers bounds the sizes that are remembered, and as many refusals; maxAsking the questions under way, and as
	// many blobs whose first byte is waited for, as upstream.Budget does.
	maxAnswers, maxAsking = 20_000, 4096
)

func newAnswers() *answers {
	return &answers{
		asking: upstream.NewBudget("questions to upstreams are under way", maxAsking),
		sizes:  ttlcache.New(ttlcache.WithTTL[question, int64](sizesFor), ttlcache.WithCapacity[question, int64](maxAnswers), ttlcache.WithDisableTouchOnHit[question, int64]()),
		noes:   ttlcache.New(ttlcache.WithCapacity[question, error](maxAnswers), ttlcache.WithDisableTouchOnHit[question, error]()),
	}
}

// no returns what an upstream refused lately, nil where it did not.
func (a *answers) no(q question) error {
	if is := a.noes.Get(q); is != nil {
		return is.Value()
	}
	return nil
}

// knows returns the size that an upstream said lately.
func (a *answers) knows(q question) (size int64, ok bool) {
	if is := a.sizes.Get(q); is != nil {
		return is.Value(), true
	}
	return 0, false
}

// note remembers an answer to q: for keep, where the upstream says no.
func (a *answers) note(q question, size int64, err error, keep time.Duration) {
	switch {
	case err == nil && size >= 0:
		a.noes.Delete(q)
		a.sizes.Set(q, size, ttlcache.DefaultTTL)
	case isNo(err):
		a.sizes.Delete(q)
		a.noes.Set(q, err, keep)
	}
}

// isNo reports whether an upstream answered, and said no.
func isNo(err error) bool {
	return errors.Is(err, registry.ErrBlobUnknown) || errors.Is(err, registry.ErrUnauthorized) || errors.Is(err, registry.ErrDenied)
}

// size returns what is known of a blob's size, or else what ask says, once for all who want to know at the same time.
// ask goes on for others when ctx is done. ErrUnavailable where too many questions to r, or to all, are under way.
func (a *answers) size(ctx context.Context, q question, r *upstream.Registry, keep time.Duration, ask func() (int64, error)) (int64, error) {
	if err := a.no(q); err != nil {
		return 0, err
	}
	if size, ok := a.knows(q); ok {
		return size, nil
	}
	ch := a.flights.DoChan(q.key(), func() (any, error) {
		release, err := a.asking.Take(r)
		if err != nil {
			return int64(0), err
		}
		defer release()
		size, err := ask()
		a.note(q, size, err, keep)
		return size, err
	})
	select {
	case r := <-ch:
		if r.Err != nil {
			return 0, r.Err
		}
		return r.Val.(int64), nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	}
}
