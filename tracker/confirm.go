package tracker

import (
	"container/list"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"github.com/opencontainers/go-digest"

	"kraken/proto/announce"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

const (
	// askAfter is how long a digest waits before an origin is asked about it: the metainfo that a download asks for
	// confirms it as well.
	askAfter = 300 * time.Millisecond
	// askAgain is when a question is asked again that no origin could answer.
	askAgain = 5 * time.Second
	// unknownFor is how long it is remembered that no origin knows a digest; a metainfo that is found meanwhile ends
	// it.
	unknownFor = 30 * time.Second

	maxConfirmed = 32_768 // digests whose confirmation outlives their swarm
	maxUnknown   = 16_384 // digests that no origin knows
	confirmers   = 16     // questions at once
	confirmBatch = 64
	confirmIdle  = 100 * time.Millisecond
)

// waiting is what a swarm has until an origin has confirmed its digest.
type waiting struct {
	source *source // who is charged for it
	place  *list.Element
	repo   string // some repository that the blob is pulled from
	ask    moment // when an origin is to be asked
}

// digestsKnown is what origins have said of digests. The store's lock guards it.
type digestsKnown struct {
	// known reports whether the metainfo of a digest is in memory; where it is nil, every digest counts as confirmed.
	known   func(digest.Digest) bool
	sure    *simplelru.LRU[digest.Digest, struct{}]
	unknown *simplelru.LRU[digest.Digest, moment] // until when
	waits   int                                   // swarms that wait for a confirmation
}

func newDigestsKnown() digestsKnown {
	sure, _ := simplelru.NewLRU[digest.Digest, struct{}](maxConfirmed, nil) // these fail only for a size below one
	unknown, _ := simplelru.NewLRU[digest.Digest, moment](maxUnknown, nil)
	return digestsKnown{sure: sure, unknown: unknown}
}

// isConfirmed reports whether an origin is known to know the digest.
func (s *store) isConfirmed(d digest.Digest) bool {
	if s.known == nil {
		return true
	}
	if w := s.swarms[d]; w != nil {
		return w.waiting == nil
	}
	if _, ok := s.sure.Get(d); ok {
		return true
	}
	return s.known(d)
}

func (s *store) isUnknown(d digest.Digest, now moment) bool {
	until, ok := s.unknown.Get(d)
	return ok && now < until
}

// await makes a new swarm wait for an origin's word, at the charge of c.
func (s *store) await(w *swarm, c *source, now moment) {
	w.waiting = &waiting{source: c, place: c.waiting.PushBack(w), ask: now + moment(askAfter)}
	s.waits++
}

// unawait ends the waiting of a swarm.
func (s *store) unawait(w *swarm) {
	x := w.waiting
	if x == nil {
		return
	}
	w.waiting = nil
	x.source.waiting.Remove(x.place)
	s.waits--
	s.forgetSource(x.source)
}

// touched notes that a waiting swarm was announced again.
func (w *swarm) touched(st *announce.BlobState) {
	if x := w.waiting; x != nil {
		x.source.waiting.MoveToBack(x.place)
		if st.Repository != "" {
			x.repo = st.Repository
		}
	}
}

// roomToWait makes room for one more swarm that waits at the charge of c.
func (s *store) roomToWait(c *source, now moment) bool {
	if c.waiting.Len() >= s.bounds.sourceUnconfirmed {
		return s.evictWaiting(c)
	}
	if s.waits < s.bounds.unconfirmed {
		return true
	}
	g := s.greediest(byWaiting, c.waiting.Len(), now)
	return g != nil && s.evictWaiting(g)
}

// evictWaiting removes the idlest of the swarms that c is charged for. One that others have announced too is charged to
// one of them instead.
func (s *store) evictWaiting(c *source) bool {
	const looks = 8
	for range looks {
		front := c.waiting.Front()
		if front == nil {
			return false
		}
		w := front.Value.(*swarm)
		if other := s.otherIn(w, c); other != nil {
			c.waiting.Remove(front)
			w.waiting.source, w.waiting.place = other, other.waiting.PushBack(w)
			if c.waiting.Len() < s.bounds.sourceUnconfirmed && s.waits < s.bounds.unconfirmed {
				return true
			}
			continue
		}
		s.evicted++
		s.remove(w, func(*peer, *entry) bool { return true })
		return true
	}
	return false
}

// otherIn finds a source other than c that has a peer in w, and room for it.
func (s *store) otherIn(w *swarm, c *source) *source {
	for _, members := range [2][]entry{w.seeds.members, w.leechers.first.members} {
		for i := range members {
			if o := s.roster.peers[members[i].peer].source; o != nil && o != c && o.waiting.Len() < s.bounds.sourceUnconfirmed {
				return o
			}
		}
	}
	return nil
}

// confirmed says that d is a blob's digest. s.mu is held.
func (s *store) confirmed(d digest.Digest) {
	s.unknown.Remove(d)
	s.sure.Add(d, struct{}{})
	if w := s.swarms[d]; w != nil {
		s.unawait(w)
	}
}

// settle takes an origin's answer about d: nil, ErrBlobUnknown, or what kept it from answering.
func (s *store) settle(d digest.Digest, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.swarms[d]
	now := s.now()
	switch {
	case err == nil:
		s.confirmed(d)
	case w == nil || w.waiting == nil: // what was confirmed once is believed as long as peers announce it
	case errors.Is(err, registry.ErrBlobUnknown):
		s.unknown.Add(d, now+moment(jitter(unknownFor)))
		s.remove(w, func(*peer, *entry) bool { return true })
	default:
		w.waiting.ask = now + moment(jitter(askAgain))
	}
}

// jitter adds up to a quarter.
func jitter(d time.Duration) time.Duration { return d + rand.N(d/4+1) }

// doubt is a digest to ask an origin about, and who is charged for the question.
type doubt struct {
	repo   string
	digest digest.Digest
	source sourceKey
}

// doubts returns at most n digests whose time to be asked about has come, of each source a share. take reports whether
// a source may ask now.
func (s *store) doubts(n int, take func(sourceKey) bool) (out []doubt) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.waits == 0 {
		return nil
	}
	now := s.now()
	share := max(1, n/len(s.sources))
	for _, c := range s.sources {
		mine := 0
		for e := c.waiting.Front(); e != nil && mine < share && len(out) < n; e = e.Next() {
			w := e.Value.(*swarm)
			if now < w.waiting.ask {
				continue
			}
			if !take(c.key) {
				break
			}
			w.waiting.ask = now + moment(time.Minute) // settle comes before
			mine++
			out = append(out, doubt{w.waiting.repo, w.digest, c.key})
		}
		if len(out) == n {
			break
		}
	}
	return out
}

// confirming asks origins about the digests that wait, a bounded number at once.
func (t *Tracker) confirming(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	jobs := make(chan doubt)
	defer close(jobs)
	for range confirmers {
		wg.Go(func() {
			for d := range jobs {
				t.confirm(ctx, d)
			}
		})
	}
	idle := time.NewTicker(confirmIdle)
	defer idle.Stop()
	for {
		batch := t.store.doubts(confirmBatch, t.questions.take)
		for _, d := range batch {
			select {
			case jobs <- d:
			case <-ctx.Done():
				return nil
			}
		}
		if len(batch) == confirmBatch {
			continue
		}
		select {
		case <-idle.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (t *Tracker) confirm(ctx context.Context, d doubt) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	if d.repo == "" {
		d.repo = cluster.AnyRepository
	}
	_, err := t.origins.StatBlob(ctx, d.repo, d.digest)
	if !errors.Is(err, registry.ErrBlobUnknown) {
		t.questions.refund(d.source)
	}
	t.store.settle(d.digest, err)
}
