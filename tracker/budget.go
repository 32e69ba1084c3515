package tracker

import (
	"container/list"
	"crypto/sha256"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
)

// source is who is charged for what is announced from it. It is there as long as it has peers, or swarms that wait for
// an origin's word.
type source struct {
	key   sourceKey
	peers []*peer // each at its place
	pairs int
	// of *swarm: those that this source is charged for until an origin has confirmed them, the idlest first
	waiting *list.List
}

func (c *source) add(p *peer) {
	p.source, p.place = c, len(c.peers)
	c.peers = append(c.peers, p)
	c.pairs += p.refs
}

func (c *source) remove(p *peer) {
	last := len(c.peers) - 1
	c.peers[p.place] = c.peers[last]
	c.peers[p.place].place = p.place
	c.peers[last] = nil
	c.peers = c.peers[:last]
	c.pairs -= p.refs
}

// keyHash is what is kept of a peer's key; zero for none.
type keyHash [16]byte

func keyHashOf(key string) (h keyHash) {
	if key != "" {
		sum := sha256.Sum256([]byte(key))
		copy(h[:], sum[:])
	}
	return h
}

// sourceOf finds or makes a source. One that is made and gets no peer is to be given to forgetSource.
func (s *store) sourceOf(k sourceKey) *source {
	c := s.sources[k]
	if c == nil {
		c = &source{key: k, waiting: list.New()}
		s.sources[k] = c
	}
	return c
}

func (s *store) forgetSource(c *source) {
	if len(c.peers) == 0 && c.waiting.Len() == 0 {
		delete(s.sources, c.key)
	}
}

// measure is what sources are compared by.
type measure int

const (
	byPeers measure = iota
	byPairs
	byWaiting
	measures
)

func (c *source) size(m measure) int {
	switch m {
	case byPeers:
		return len(c.peers)
	case byPairs:
		return c.pairs
	}
	return c.waiting.Len()
}

// ranked is the source that took most when all were compared last.
type ranked struct {
	source *source
	size   int
	at     moment
}

// rankFor is how long a comparison of all sources is used.
const rankFor = moment(100 * time.Millisecond)

// greediest returns the source that takes most of what m measures, nil where none takes more than its share, which is
// what one more takes that has mine so far, with so much to spare that honest sources don't push each other out.
func (s *store) greediest(m measure, mine int, now moment) *source {
	r := &s.greedy[m]
	if r.source == nil || now-r.at > rankFor || r.source.size(m) < r.size/2 {
		if r.at != 0 && now-r.at <= rankFor/10 {
			return nil // compared a moment ago, and pushed out since
		}
		*r = ranked{at: max(now, 1)}
		for _, c := range s.sources {
			if n := c.size(m); n > r.size {
				r.source, r.size = c, n
			}
		}
	}
	const spare = 64
	if r.source == nil || r.source.size(m) <= 4*(mine+1)+spare {
		return nil
	}
	return r.source
}

// evictIdlest evicts the peer of c that was not heard of for longest, other than but. It is false where there is none.
func (s *store) evictIdlest(c *source, but *peer) bool {
	var idlest *peer
	for _, p := range c.peers {
		if p != but && (idlest == nil || p.seen < idlest.seen) {
			idlest = p
		}
	}
	if idlest == nil {
		return false
	}
	s.evict(idlest)
	return true
}

// evict forgets a peer with all its entries. Those are removed by a sweep, which comes soon where they are many.
func (s *store) evict(p *peer) {
	s.evicted++
	if p.refs == 0 {
		s.forgetPeer(p)
		return
	}
	s.unaddress(p)
	c := p.source
	c.remove(p)
	s.forgetSource(c)
	p.source, p.gone = nil, true
	s.goners++
	s.pairs -= p.refs
	s.dead += p.refs
	if s.dead > s.bounds.pairs/16 {
		s.sweepSoon()
	}
}

// revive takes back a peer that was evicted and whose entries are still there. The caller gives it to a source.
func (s *store) revive(p *peer) {
	p.gone = false
	s.goners--
	s.pairs += p.refs
	s.dead -= p.refs
}

// sweepSoon asks for a sweep before its time.
func (s *store) sweepSoon() {
	select {
	case s.full <- struct{}{}:
	default:
	}
}

// roomForPeer makes room for one more peer of c, false where all are taken by sources that have no more than their
// share.
func (s *store) roomForPeer(c *source, now moment) bool {
	if len(c.peers) >= s.bounds.sourcePeers {
		return s.evictIdlest(c, nil)
	}
	if len(s.peers) < s.bounds.peers {
		return true
	}
	if len(s.peers)-s.goners < s.bounds.peers {
		s.sweepSoon()
		return len(s.peers) < s.bounds.peers+s.bounds.peers/4
	}
	g := s.greediest(byPeers, len(c.peers), now)
	if g == nil {
		return false
	}
	return s.evictIdlest(g, nil)
}

// roomForPair makes room for p in w, the swarm of d, which is nil where it is to be made. It returns why there is none.
func (s *store) roomForPair(p *peer, w *swarm, d digest.Digest, now moment) (why string) {
	c := p.source
	switch {
	case w == nil && !s.isConfirmed(d) && s.isUnknown(d, now):
		return whyUnknown
	case c.pairs >= s.bounds.sourcePairs && !s.evictIdlest(c, p):
		return whyFull
	case s.pairs >= s.bounds.pairs:
		g := s.greediest(byPairs, c.pairs, now)
		if g == nil || !s.evictIdlest(g, p) {
			return whyFull
		}
	}
	if s.dead > 0 && s.pairs+s.dead >= s.bounds.pairs+s.bounds.pairs/8 {
		s.sweepSoon()
		return whyFull // for some milliseconds, or until its next announce
	}
	if w == nil {
		if !s.isConfirmed(d) && !s.roomToWait(c, now) {
			return whyFull
		}
		return ""
	}
	if w.len() >= s.bounds.swarm && !s.trim(w, c, now) {
		return whyFull
	}
	return ""
}

// trimEvery is how often a full swarm is looked at for a source that has too many places in it.
const trimEvery = tick(10)

// trim removes the idlest places of the source that has most in a full swarm, if that is far more than c has. It is
// false where it removes none.
func (s *store) trim(w *swarm, c *source, now moment) bool {
	t := max(tickOf(now), 1)
	if w.trimmed != 0 && t-w.trimmed < trimEvery {
		return false
	}
	w.trimmed = t
	places := map[*source][]tick{}
	for _, members := range [2][]entry{w.seeds.members, w.leechers.first.members} {
		for i := range members {
			if p := s.roster.peers[members[i].peer]; !p.gone {
				places[p.source] = append(places[p.source], members[i].seen)
			}
		}
	}
	var greedy *source
	for k, seen := range places {
		if greedy == nil || len(seen) > len(places[greedy]) {
			greedy = k
		}
	}
	n := len(places[greedy])
	if n <= 4*(len(places[c])+1) {
		greedy = nil
	}
	idle := tick(0)
	left := 0
	if greedy != nil {
		seen := places[greedy]
		slices.Sort(seen)
		left = max(1, n/4)
		idle = seen[left-1]
	}
	before := w.len()
	s.remove(w, func(p *peer, e *entry) bool {
		if p.gone {
			return true
		}
		if p.source != greedy || e.seen > idle || left == 0 {
			return false
		}
		left--
		return true
	})
	return w.len() < before
}
