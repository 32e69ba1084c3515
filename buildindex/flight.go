package buildindex

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"kraken/proto/registry"
)

// flight is one question to an upstream that is under way, for all who ask it, and its answer.
type flight struct {
	began time.Time
	free  func() // gives its place back
	done  chan struct{}
	value any
	err   error
}

// maxFlights bounds the questions that are under way, as upstream.Budget does.
const maxFlights = 4096

// ask does f for the question about ref, once for all who ask at the same time, and waits for it for patience, counted
// from when it began: ErrUnavailable after that, while f goes on. What was refused lately is refused without asking.
func (mi *mirror) ask(ctx context.Context, q question, ref string, patience time.Duration, f func(context.Context) error) error {
	_, err := askFor(ctx, mi, q, ref, times{patience, coldPatience}, func(ctx context.Context) (struct{}, error) { return struct{}{}, f(ctx) })
	return err
}

// times are for how long a question is waited for, and how long it takes at most.
type times struct{ patience, limit time.Duration }

// askFor is ask for a question with an answer. Who waits gets it from the flight: what is remembered elsewhere may be
// forgotten before.
func askFor[T any](ctx context.Context, mi *mirror, q question, ref string, t times, f func(context.Context) (T, error)) (v T, err error) {
	fl, err := mi.join(q, q.key(ref), t.limit, func(ctx context.Context) (any, error) { return f(ctx) })
	if err == nil {
		err = fl.wait(ctx, q, t.patience)
	}
	if err != nil {
		return v, err
	}
	v, _ = fl.value.(T)
	return v, nil
}

// join returns the flight that is under way, or begins it.
func (mi *mirror) join(q question, key string, limit time.Duration, f func(context.Context) (any, error)) (*flight, error) {
	mi.mu.Lock()
	defer mi.mu.Unlock()
	if err, ok := mi.refused.get(key); ok {
		return nil, err
	}
	if fl := mi.flights[key]; fl != nil {
		return fl, nil
	}
	free, err := mi.asking.Take(q.up)
	if err != nil {
		return nil, err
	}
	fl := &flight{began: time.Now(), free: free, done: make(chan struct{})}
	mi.flights[key] = fl
	if !mi.x.Background(func(ctx context.Context) { mi.fly(ctx, q, key, fl, limit, f) }) {
		delete(mi.flights, key)
		free()
		return nil, isAway(errors.New("this build-index ends"))
	}
	return fl, nil
}

// wait waits for the answer, until patience is over since the question was asked.
func (fl *flight) wait(ctx context.Context, q question, patience time.Duration) error {
	t := time.NewTimer(max(patience-time.Since(fl.began), 0))
	defer t.Stop()
	select {
	case <-fl.done:
		return fl.err
	default:
	}
	select {
	case <-fl.done:
		return fl.err
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return &registry.RetryError{Err: fmt.Errorf("%w: %s does not answer about %s", registry.ErrUnavailable, q.up.Host, q.remote), After: time.Second}
	}
}

// fly does f and tells who waits.
func (mi *mirror) fly(ctx context.Context, q question, key string, fl *flight, limit time.Duration, f func(context.Context) (any, error)) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	v, err := f(ctx)
	err = public(q, err)
	if errors.Is(err, registry.ErrUnauthorized) || errors.Is(err, registry.ErrDenied) {
		mi.grants.drop(q.grant)
	}
	mi.mu.Lock()
	defer mi.mu.Unlock()
	if keep := mi.refusal(q, err); keep > 0 {
		mi.refused.put(key, err, keep)
	}
	delete(mi.flights, key)
	fl.free()
	fl.value, fl.err = v, err
	close(fl.done)
}

// refusal returns how long an answer is given again without asking.
func (mi *mirror) refusal(q question, err error) time.Duration {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, registry.ErrUnavailable):
		return min(restBetween, time.Duration(q.up.NegativeTTL))
	}
	return time.Duration(q.up.NegativeTTL)
}

// public returns an upstream's error as the cluster answers it. A refusal of the cluster's own credentials is no
// challenge to who asks, who may have others at the upstream.
func public(q question, err error) error {
	var unauthorized *registry.UnauthorizedError
	switch {
	case q.grant != "" && errors.As(err, &unauthorized):
		return fmt.Errorf("%w: %s refuses what was presented", registry.ErrUnauthorized, q.up.Host)
	case q.grant == "" && errors.Is(err, registry.ErrUnauthorized):
		return fmt.Errorf("%w: %s does not let this cluster read %s", registry.ErrDenied, q.up.Host, q.remote)
	case errors.Is(err, registry.ErrTooManyRequests):
		return fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
	}
	return err
}

// remembered is a bounded memory of things, each for a time of its own. It is safe for concurrent use.
type remembered[K comparable, V any] struct {
	max int

	mu    sync.Mutex
	items map[K]item[V]
}

type item[V any] struct {
	value V
	until time.Time // zero: until there is no room
}

// get returns what is remembered of k.
func (r *remembered[K, V]) get(k K) (v V, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	i, ok := r.items[k]
	if ok && !i.until.IsZero() && time.Now().After(i.until) {
		delete(r.items, k)
		return v, false
	}
	return i.value, ok
}

// put remembers v for a time, 0 for as long as there is room.
func (r *remembered[K, V]) put(k K, v V, keep time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.items == nil {
		r.items = map[K]item[V]{}
	}
	if _, there := r.items[k]; !there && len(r.items) >= r.max {
		r.makeRoom()
	}
	i := item[V]{value: v}
	if keep > 0 {
		i.until = time.Now().Add(keep)
	}
	r.items[k] = i
}

// makeRoom forgets what is over, or else an eighth, whichever comes first in the map. The caller holds r.mu.
func (r *remembered[K, V]) makeRoom() {
	now := time.Now()
	for k, i := range r.items {
		if !i.until.IsZero() && now.After(i.until) {
			delete(r.items, k)
		}
	}
	for k := range r.items {
		if len(r.items) < r.max-r.max/8 {
			break
		}
		delete(r.items, k)
	}
}

// clear forgets all.
func (r *remembered[K, V]) clear() {
	r.mu.Lock()
	defer r.mu.Unlock()
	clear(r.items)
}

// drop forgets k.
func (r *remembered[K, V]) drop(k K) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.items, k)
}
