package tracker

import (
	"net/netip"
	"runtime"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/announce"
	"kraken/proto/blob"
)

// number names a peer inside the store, in half of the bytes of a pointer, and where the garbage collector need not look.
type number uint32

// peer is one announcer, shared by its entries in all swarms.
type peer struct {
	number number // its place in the roster
	id     announce.PeerID
	hash   uint64
	addrs  [2]netip.AddrPort // IPv4, IPv6; zero where it has none
	node   string
	stock  bool
	seen   moment // last announce of anything
	refs   int    // entries
	// replaced: another peer announced this one's address since. Its entries are passed over until they expire.
	replaced bool
}

func (p *peer) dialable() bool {
	return !p.replaced && (p.addrs[0].IsValid() || p.addrs[1].IsValid())
}

// roster is all peers by number. The number of one that is gone is given again: no entry has it any more.
type roster struct {
	peers []*peer
	free  []number
}

func (r *roster) add(p *peer) {
	if n := len(r.free); n > 0 {
		p.number, r.free = r.free[n-1], r.free[:n-1]
		r.peers[p.number] = p
		return
	}
	p.number = number(len(r.peers))
	r.peers = append(r.peers, p)
}

func (r *roster) remove(p *peer) {
	r.peers[p.number] = nil
	r.free = append(r.free, p.number)
}

// moment is a time since the store began. It takes a third of the memory of a time.Time.
type moment time.Duration

// tick is a moment as entries keep it, in tenths of a second, rounded up so that nobody is forgotten too early. It lasts 13 years.
type tick uint32

const tickLength = moment(100 * time.Millisecond)

func tickOf(m moment) tick { return tick((m + tickLength - 1) / tickLength) }

func (t tick) moment() moment { return moment(t) * tickLength }

// entry is what a peer said of a blob last. There may be millions, so it has 20 bytes and no pointer. Its numbers of bytes are
// shown to people only, seven digits of them are enough; that nothing is left, or that it is not known, is kept exactly.
type entry struct {
	peer     number
	seen     tick
	left     float32 // -1: not known
	up, down float32
}

func (e entry) who() number { return e.peer }

// maxCount bounds the bytes that are kept of what a peer says it has moved, so that they are an int64 again when they are shown.
const maxCount = 1 << 50

func entryOf(p *peer, st *announce.BlobState, now moment) entry {
	e := entry{
		peer: p.number, seen: tickOf(now), left: float32(st.Left),
		up: float32(min(st.Uploaded, maxCount)), down: float32(min(st.Downloaded, maxCount)),
	}
	if st.Event == announce.EventCompleted {
		e.left = 0
	}
	return e
}

// swarm is a blob with the peers that hold some of it, each either among the seeds or among the leechers.
type swarm struct {
	digest   digest.Digest
	hash     blob.InfoHash // zero while the metainfo was not seen
	size     int64         // 0 when not known
	since    moment
	leechers mesh
	seeds    circle[entry]
}

func (w *swarm) len() int { return len(w.seeds.members) + w.leechers.len() }

// entry is what p said, nil when it said nothing. It stays valid until the swarm is changed.
func (w *swarm) entry(r *roster, p *peer) *entry {
	if i, found := w.seeds.find(r, p); found {
		return &w.seeds.members[i]
	}
	return w.leechers.entry(r, p)
}

func (w *swarm) place(r *roster, e entry) {
	if e.left == 0 {
		w.seeds.add(r, e)
	} else {
		w.leechers.add(r, e)
	}
}

func (w *swarm) displace(r *roster, e entry) {
	if e.left == 0 {
		w.seeds.remove(r, r.peers[e.peer])
	} else {
		w.leechers.remove(r, r.peers[e.peer])
	}
}

// bounds of what is kept.
type bounds struct {
	peers int // distinct peers
	pairs int // entries in all swarms
	swarm int // entries in one swarm
}

// store is the soft state: who has what. All of it is announced again within an interval, so losing it costs no more.
type store struct {
	ttl, stockTTL time.Duration
	degree        int // of the mesh
	bounds        bounds
	began         time.Time

	mu     sync.Mutex
	swarms map[digest.Digest]*swarm
	byHash map[blob.InfoHash]*swarm
	roster roster
	peers  map[announce.PeerID]*peer
	byAddr map[netip.AddrPort]*peer
	pairs  int
}

// stockTTL is how long a stock client is believed at least. Some (libtorrent among them) announce every five minutes whatever
// interval they are told.
const stockTTL = 11 * time.Minute

// newStore forgets an entry after three intervals without an announce.
func newStore(interval time.Duration, degree int, b bounds) *store {
	return &store{
		ttl: 3 * interval, stockTTL: max(3*interval, stockTTL), degree: degree, bounds: b, began: time.Now(),
		swarms: map[digest.Digest]*swarm{}, byHash: map[blob.InfoHash]*swarm{},
		peers: map[announce.PeerID]*peer{}, byAddr: map[netip.AddrPort]*peer{},
	}
}

func (s *store) now() moment { return moment(time.Since(s.began)) }

func (s *store) expired(stock bool, seen, now moment) bool {
	ttl := s.ttl
	if stock {
		ttl = s.stockTTL
	}
	return time.Duration(now-seen) > ttl
}

// identity is what an announcer says of itself.
type identity struct {
	id    announce.PeerID
	addrs [2]netip.AddrPort
	node  string
	stock bool
}

// register takes an announce. It returns how many states were not taken because a bound is reached: their sender is
// answered all the same, and is only not handed out to others.
func (s *store) register(who identity, states []announce.BlobState) (refused int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	p := s.peerOf(who, now)
	if p == nil {
		return len(states)
	}
	for i := range states {
		st := &states[i]
		if st.Event == announce.EventStopped {
			if w := s.swarms[st.Digest]; w != nil {
				s.drop(w, p)
			}
			continue
		}
		if !s.update(p, st, now) {
			refused++
		}
	}
	return refused
}

// peerOf finds or makes the record of an announcer, nil when there are too many.
func (s *store) peerOf(who identity, now moment) *peer {
	p := s.peers[who.id]
	if p == nil {
		if len(s.peers) >= s.bounds.peers {
			return nil
		}
		p = &peer{id: who.id, hash: hashOf(who.id), stock: who.stock}
		s.peers[who.id] = p
		s.roster.add(p)
	}
	p.seen, p.replaced = now, false
	if who.node != "" {
		p.node = who.node
	}
	for i, a := range who.addrs {
		// A stock client is seen in one family at a time; an agent says both each time.
		if old := p.addrs[i]; old != a && (a.IsValid() || !who.stock) {
			if s.byAddr[old] == p {
				delete(s.byAddr, old)
			}
			p.addrs[i] = a
		}
		if !a.IsValid() {
			continue
		}
		// Only one process can listen at an address: who had it before has been restarted with another id.
		if other := s.byAddr[a]; other != nil && other != p {
			other.replaced = true
		}
		s.byAddr[a] = p
	}
	return p
}

// update is false when a bound is reached.
func (s *store) update(p *peer, st *announce.BlobState, now moment) bool {
	w := s.swarms[st.Digest]
	var old *entry
	if w != nil {
		old = w.entry(&s.roster, p)
	}
	if old == nil && (s.pairs >= s.bounds.pairs || (w != nil && w.len() >= s.bounds.swarm)) {
		return false
	}
	if w == nil {
		w = &swarm{digest: st.Digest, since: now, leechers: newMesh(st.Digest, s.degree), seeds: circle[entry]{salt: saltOf(st.Digest)}}
		s.swarms[st.Digest] = w
	}
	if w.size == 0 {
		w.size = st.Size
	}
	e := entryOf(p, st, now)
	switch {
	case old == nil:
		s.pairs++
		p.refs++
		w.place(&s.roster, e)
	case (old.left == 0) != (e.left == 0):
		w.displace(&s.roster, *old)
		w.place(&s.roster, e)
	default:
		*old = e
	}
	return true
}

// drop removes an entry, and the swarm with its last one.
func (s *store) drop(w *swarm, p *peer) {
	e := w.entry(&s.roster, p)
	if e == nil {
		return
	}
	w.displace(&s.roster, *e)
	p.refs--
	s.pairs--
	s.forgetEmpty(w)
}

func (s *store) forgetEmpty(w *swarm) {
	if w.len() > 0 {
		return
	}
	delete(s.swarms, w.digest)
	if s.byHash[w.hash] == w {
		delete(s.byHash, w.hash)
	}
}

// learn notes what a metainfo says of a swarm, if there is one.
func (s *store) learn(d digest.Digest, h blob.InfoHash, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.swarms[d]
	if w == nil {
		return
	}
	if w.hash != h && s.byHash[w.hash] == w {
		delete(s.byHash, w.hash)
	}
	w.hash, w.size = h, size
	s.byHash[h] = w
}

// lookup finds a swarm whose metainfo was seen.
func (s *store) lookup(h blob.InfoHash) (d digest.Digest, size int64, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if w := s.byHash[h]; w != nil {
		return w.digest, w.size, true
	}
	return "", 0, false
}

// atOnce is how many swarms or peers a walk looks at before it lets others in: announces don't wait for a walk, not on one core either.
const atOnce = 256

// breathe lets others have the lock, and the processor. s.mu is held before and after.
func (s *store) breathe() {
	s.mu.Unlock()
	runtime.Gosched()
	s.mu.Lock()
}

// digests are the keys of all swarms, so that long walks take the lock for one swarm at a time.
func (s *store) digests() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]digest.Digest, 0, len(s.swarms))
	for d := range s.swarms { // what comes or goes meanwhile may or may not be among them
		if out = append(out, d); len(out)%atOnce == 0 {
			s.breathe()
		}
	}
	return out
}

// eachPeer calls f, with the lock held, for every peer that is there all the time.
func (s *store) eachPeer(f func(*peer)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := 0; i < len(s.roster.peers); i++ {
		if i%atOnce == atOnce-1 {
			s.breathe()
		}
		if p := s.roster.peers[i]; p != nil {
			f(p)
		}
	}
}

// sweep forgets what has not been announced for its time.
func (s *store) sweep() {
	for i, d := range s.digests() {
		s.sweepSwarm(d)
		if i%atOnce == atOnce-1 {
			runtime.Gosched()
		}
	}
	s.eachPeer(func(p *peer) {
		if p.refs > 0 || !s.expired(p.stock, p.seen, s.now()) {
			return
		}
		delete(s.peers, p.id)
		s.roster.remove(p)
		for _, a := range p.addrs {
			if s.byAddr[a] == p {
				delete(s.byAddr, a)
			}
		}
	})
}

func (s *store) sweepSwarm(d digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	w := s.swarms[d]
	if w == nil {
		return
	}
	now := s.now()
	gone := map[number]bool{}
	for _, members := range [2][]entry{w.seeds.members, w.leechers.first.members} {
		for _, e := range members {
			if p := s.roster.peers[e.peer]; s.expired(p.stock, e.seen.moment(), now) {
				gone[e.peer] = true
				p.refs--
				s.pairs--
			}
		}
	}
	if len(gone) == 0 {
		return
	}
	w.seeds.forget(gone)
	w.leechers.forget(gone)
	s.forgetEmpty(w)
}

// counts are what the metrics show.
func (s *store) counts() (swarms, peers, pairs int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.swarms), len(s.peers), s.pairs
}
