package tracker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/registry"
)

const (
	fetchTimeout = 10 * time.Second // of one question to all origins
	// hedgeAfter is how long one origin is waited for before the next is asked as well.
	hedgeAfter = 250 * time.Millisecond
	// negativeFor is how long a failure is remembered, and up to a quarter more: long enough that a rush of agents asks
	// once, and so short that what was asked for before it was pushed is found right after.
	negativeFor = 500 * time.Millisecond
	// refreshAfter is the age at which a metainfo is fetched again while it is still handed out: an origin may have
	// found that its own was wrong, and a blob may be gone.
	refreshAfter = time.Minute

	maxFetching  = 1000 // questions that wait or run; more are refused
	maxAtOnce    = 32   // questions that run
	maxNegative  = 10_000
	infoOverhead = 400 // bytes that a kept metainfo takes besides its encoding
)

var errTooMany = fmt.Errorf("%w: you have asked for too many digests that no origin knows, ask for fewer", registry.ErrTooManyRequests)

var errFetching = fmt.Errorf("%w: metainfo is being fetched", registry.ErrUnavailable)

// asker is an origin that can be asked for metainfo.
type asker interface {
	Metainfo(ctx context.Context, repo string, d digest.Digest) (*blob.Metainfo, error)
}

// info is a metainfo in the form in which it leaves.
type info struct {
	digest  digest.Digest
	hash    blob.InfoHash
	size    int64
	encoded []byte
	fetched time.Time
}

// question is what is asked once for any number of askers. The repository chooses the bucket that a cold blob comes
// from.
type question struct {
	repo   string
	digest digest.Digest
}

// fetch is a question under way; done is closed when info and err are set.
type fetch struct {
	charged sourceKey // who is charged if no origin knows the digest
	done    chan struct{}
	info    *info
	err     error
}

type failure struct {
	err   error
	until time.Time
}

// metainfos asks origins for metainfo and keeps it while memory allows.
type metainfos struct {
	order  func(digest.Digest) []asker // best first
	limit  int64                       // bytes
	log    *slog.Logger
	m      *metrics
	ctx    context.Context // of fetches: they go on when their asker gives up
	stop   context.CancelFunc
	wg     sync.WaitGroup
	places chan struct{}
	asked  *questions // nil: nobody is charged

	mu       sync.Mutex
	closed   bool
	used     int64
	known    *simplelru.LRU[digest.Digest, *info]
	byHash   map[blob.InfoHash]*info
	fetching map[question]*fetch
	negative *simplelru.LRU[question, failure]
}

func newMetainfos(order func(digest.Digest) []asker, limit int64, log *slog.Logger, m *metrics) (*metainfos, error) {
	c := &metainfos{
		order: order, limit: limit, log: log, m: m, places: make(chan struct{}, maxAtOnce),
		byHash: map[blob.InfoHash]*info{}, fetching: map[question]*fetch{},
	}
	var err error
	c.known, err = simplelru.NewLRU(math.MaxInt32, func(_ digest.Digest, i *info) {
		c.used -= int64(len(i.encoded)) + infoOverhead
		if c.byHash[i.hash] == i {
			delete(c.byHash, i.hash)
		}
	})
	if err != nil {
		return nil, err
	}
	if c.negative, err = simplelru.NewLRU[question, failure](maxNegative, nil); err != nil {
		return nil, err
	}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c, nil
}

// run ends what is under way when ctx is done, and waits for it.
func (c *metainfos) run(ctx context.Context) error {
	<-ctx.Done()
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.stop()
	c.wg.Wait()
	return nil
}

// cached answers at once.
func (c *metainfos) cached(repo string, d digest.Digest) (*info, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, ok := c.known.Get(d)
	if !ok {
		return nil, false
	}
	if time.Since(i.fetched) > refreshAfter {
		i.fetched = time.Now() // whatever comes of it, not again before the next time
		// Nobody waits for it: what is known is handed out meanwhile.
		_, _ = c.begin(question{repo, d}, sourceKey{})
	}
	return i, true
}

// get answers from memory, or asks the origins, at the charge of from, and waits until ctx is done; the question goes
// on then.
func (c *metainfos) get(ctx context.Context, q question, from sourceKey) (*info, error) {
	if i, ok := c.cached(q.repo, q.digest); ok {
		c.m.metainfoHits.Inc()
		return i, nil
	}
	c.mu.Lock()
	if n, ok := c.negative.Get(q); ok {
		if time.Now().Before(n.until) {
			c.mu.Unlock()
			c.m.metainfoHits.Inc()
			return nil, n.err
		}
		c.negative.Remove(q)
	}
	c.m.metainfoMisses.Inc()
	f, err := c.begin(q, from)
	c.mu.Unlock()
	if err != nil {
		return nil, err
	}
	select {
	case <-f.done:
		return f.info, f.err
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %s", errFetching, q.digest)
	}
}

// find is a metainfo in memory by its info-hash.
func (c *metainfos) find(h blob.InfoHash) (*info, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	i, ok := c.byHash[h]
	return i, ok
}

// has reports whether the metainfo of d is in memory.
func (c *metainfos) has(d digest.Digest) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.known.Contains(d)
}

// begin joins the fetch of q, or starts it at the charge of a source. c.mu is held.
func (c *metainfos) begin(q question, from sourceKey) (*fetch, error) {
	if f := c.fetching[q]; f != nil {
		return f, nil
	}
	if c.closed || len(c.fetching) >= maxFetching {
		return nil, fmt.Errorf("%w: metainfo of %s: too many are being fetched", registry.ErrUnavailable, q.digest)
	}
	if c.asked != nil && from != (sourceKey{}) && !c.asked.take(from) {
		return nil, errTooMany
	}
	f := &fetch{charged: from, done: make(chan struct{})}
	c.fetching[q] = f
	c.wg.Go(func() {
		m, err := c.fetch(q)
		if c.asked != nil && !errors.Is(err, registry.ErrBlobUnknown) {
			c.asked.refund(f.charged)
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		f.info, f.err = c.keep(q, m, err), err
		delete(c.fetching, q)
		close(f.done)
	})
	return f, nil
}

// keep remembers the outcome of a fetch. c.mu is held.
func (c *metainfos) keep(q question, m *blob.Metainfo, err error) *info {
	if err != nil {
		c.m.metainfoErrors.Inc()
		c.negative.Add(q, failure{err, time.Now().Add(jitter(negativeFor))})
		if errors.Is(err, registry.ErrBlobUnknown) {
			c.known.Remove(q.digest)
		}
		return nil
	}
	i := &info{digest: m.Digest, hash: m.InfoHash(), size: m.Size, encoded: m.Marshal(), fetched: time.Now()}
	c.known.Remove(i.digest)
	cost := int64(len(i.encoded)) + infoOverhead
	if cost > c.limit {
		return i
	}
	for c.used+cost > c.limit {
		c.known.RemoveOldest()
	}
	c.used += cost
	c.known.Add(i.digest, i)
	c.byHash[i.hash] = i
	return i
}

func (c *metainfos) fetch(q question) (*blob.Metainfo, error) {
	select {
	case c.places <- struct{}{}:
		defer func() { <-c.places }()
	case <-c.ctx.Done():
		return nil, fmt.Errorf("%w: this tracker is stopping", registry.ErrUnavailable)
	}
	ctx, cancel := context.WithTimeout(c.ctx, fetchTimeout)
	defer cancel()
	m, err := ask(ctx, c.order(q.digest), q)
	if err != nil {
		c.log.Debug("no metainfo", "digest", q.digest, "repository", q.repo, "error", err)
	}
	return m, err
}

// ask asks origin after origin, the next one as soon as one has failed or has been slow. An origin looks at the others
// and at the bucket by itself, so its 404 is everybody's.
func ask(ctx context.Context, origins []asker, q question) (*blob.Metainfo, error) {
	type answer struct {
		m   *blob.Metainfo
		err error
	}
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	answers := make(chan answer, len(origins))
	asked, waiting := 0, 0
	hedge := time.NewTimer(hedgeAfter)
	defer hedge.Stop()
	next := func() {
		if asked == len(origins) {
			return
		}
		o := origins[asked]
		asked, waiting = asked+1, waiting+1
		wg.Go(func() {
			m, err := o.Metainfo(ctx, q.repo, q.digest)
			answers <- answer{m, err}
		})
		hedge.Reset(hedgeAfter)
	}
	next()
	var errs []error
	for waiting > 0 {
		select {
		case a := <-answers:
			waiting--
			if a.err == nil || errors.Is(a.err, registry.ErrBlobUnknown) {
				return a.m, a.err
			}
			errs = append(errs, a.err)
			next()
		case <-hedge.C:
			next()
		}
	}
	return nil, fmt.Errorf("%w: metainfo of %s: %w", registry.ErrUnavailable, q.digest, errors.Join(errs...))
}

// bytes is the memory in use.
func (c *metainfos) bytes() int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.used
}
