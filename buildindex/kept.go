package buildindex

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/role"
)

// A change is acknowledged when it is in SQL and in further places: at as many origins as there are replicas, or in the
// bucket. While too few origins answer it waits for the bucket: a build-index that has lost its database goes by all
// origins but replicas - 1, and would not know of a change that only one of those has.

// defaultKeptWait is how long a change that too few origins keep waits for the bucket. A proxy asks again for longer.
const defaultKeptWait = 3 * time.Second

// copies is how many origins keep a change, or a blob that is owed, before it is acknowledged.
func (x *Index) copies() int { return min(x.cfg.Replicas, len(x.origins.All())) }

// publications tells those who wait when a bucket has a change. It is safe for concurrent use.
type publications struct {
	mu      sync.Mutex
	waiting map[int64]chan struct{} // by generation; closed when a bucket has the change
}

// expect returns channels that are closed when a bucket has the changes. The caller calls forget for the same records.
func (p *publications) expect(rs []cluster.NameRecord) []<-chan struct{} {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.waiting == nil {
		p.waiting = map[int64]chan struct{}{}
	}
	out := make([]<-chan struct{}, len(rs))
	for i, r := range rs {
		c := make(chan struct{})
		p.waiting[r.Generation], out[i] = c, c
	}
	return out
}

func (p *publications) forget(rs []cluster.NameRecord) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range rs {
		delete(p.waiting, r.Generation)
	}
}

// awaited returns the generations of changes that somebody waits for, oldest first.
func (p *publications) awaited() []int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Sorted(maps.Keys(p.waiting))
}

// tell says that a bucket has the change of a generation.
func (p *publications) tell(generation int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if c, ok := p.waiting[generation]; ok {
		close(c)
		delete(p.waiting, generation)
	}
}

// durableEvery is how often it is asked whether the bucket has a blob.
const durableEvery = 200 * time.Millisecond

// awaitDurable waits until the bucket of a repository has a blob, ErrTooFewCopies when that takes too long. That enough
// origins say by now that they owe it is not enough: one that was killed while it committed has promised nothing.
func (x *Index) awaitDurable(ctx context.Context, repo string, d digest.Digest) error {
	ctx, cancel := context.WithTimeout(ctx, x.keptWait)
	defer cancel()
	for {
		durable, err := x.isDurable(ctx, repo, d)
		if durable {
			return nil
		}
		if !role.Pause(ctx, durableEvery) {
			return tooFew(x.keptWait, err)
		}
	}
}

// isDurable asks all origins at once whether the bucket has a blob.
func (x *Index) isDurable(ctx context.Context, repo string, d digest.Digest) (durable bool, err error) {
	origins := x.origins.All()
	answers, errs := make([]cluster.DurableResponse, len(origins)), make([]error, len(origins))
	var wg sync.WaitGroup
	for i, o := range origins {
		wg.Go(func() { answers[i], errs[i] = x.askDurable(ctx, o, repo, []digest.Digest{d}) })
	}
	wg.Wait()
	for _, a := range answers {
		durable = durable || len(a.Durable) > 0
	}
	return durable, errors.Join(errs...)
}

// tooFew is what a client is told whose change the bucket does not have in time; err may say why.
func tooFew(wait time.Duration, err error) error {
	e := fmt.Errorf("%w: too few origins answer, and the bucket does not have it after %s", registry.ErrTooFewCopies, wait)
	if err != nil {
		e = fmt.Errorf("%w: %w", e, err)
	}
	return &registry.RetryError{Err: e, After: time.Second}
}

// awaitBucket waits until a bucket has all the changes, ErrTooFewCopies when that takes too long. They stay, and may
// yet be published.
func (x *Index) awaitBucket(ctx context.Context, changes []<-chan struct{}) error {
	t := time.NewTimer(x.keptWait)
	defer t.Stop()
	for _, c := range changes {
		select {
		case <-c:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-t.C:
			return tooFew(x.keptWait, nil)
		}
	}
	return nil
}
