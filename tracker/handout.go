package tracker

import (
	"net/netip"

	"github.com/opencontainers/go-digest"

	"kraken/proto/announce"
)

// candidate is a peer that is handed out.
type candidate struct {
	id       announce.PeerID
	addrs    [2]netip.AddrPort
	complete bool
}

// handout is the answer to "who has it?".
type handout struct {
	peers           []candidate
	seeds, leechers int // in the whole swarm
}

// degreeOf is the share of an answer that leechers get: three quarters. The rest is kept for complete peers, so that
// each leecher knows some, and none of them is asked by everybody.
func degreeOf(numWant int) int { return max(2, numWant*3/4) }

// asking is who is given peers.
type asking struct {
	id    announce.PeerID
	local bool // it comes from loopback, and can dial what listens there
}

// handout picks at most numWant peers of d for who asks: its neighbours in the mesh, and complete peers for what is
// left, at most half of the answer. A complete peer is given only those that lack something. Never given: the asker
// itself, also under an id that it had before a restart, peers that can't be dialled, peers whose time is over.
func (s *store) handout(d digest.Digest, to asking, numWant int) handout {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.swarms[d]
	if w == nil {
		return handout{}
	}
	out := handout{seeds: len(w.seeds.members), leechers: w.leechers.len()}
	asker := s.peers[to.id]
	if asker == nil { // it stopped, or there are too many peers to know them all
		asker = &peer{id: to.id, hash: hashOf(to.id)}
	}
	now := s.now()
	usable := func(e *entry) bool {
		p := s.roster.peers[e.peer]
		_, ok := p.given(to.local)
		return ok && !s.expired(p.stock, e.seen.moment(), now)
	}
	add := func(entries []*entry, complete bool) {
		for _, e := range entries {
			if len(out.peers) < numWant && usable(e) {
				p := s.roster.peers[e.peer]
				addrs, _ := p.given(to.local)
				out.peers = append(out.peers, candidate{p.id, addrs, complete})
			}
		}
	}
	if _, complete := w.seeds.find(&s.roster, asker); complete {
		add(pick(&w.leechers.first, &s.roster, asker, numWant, usable), false)
		return out
	}
	// Complete ones first: a client that asks for few should not be left with peers that have nothing yet.
	kept := min(w.leechers.len(), s.degree, numWant*3/4)
	add(pick(&w.seeds, &s.roster, asker, min(numWant-kept, (numWant+1)/2), usable), true)
	add(w.leechers.neighbours(&s.roster, asker), false)
	return out
}
