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

// number names a peer inside the store, in half of the bytes of a pointer, and where the garbage collector need not
// look.
type number uint32

// peer is one announcer, shared by its entries in all swarms.
type peer struct {
	number number // its place in the roster
	id     announce.PeerID
	hash   uint64
	addrs  [2]netip.AddrPort // IPv4, IPv6; zero where it has none
	node   string
	stock  bool
	seen   moment    // last announce of anything
	proven [2]moment // when the address was proven last
	refs   int       // entries
	source *source
	place  int // in source.peers
	key    keyHash
	// gone: it was evicted. Its entries are passed over until a sweep removes them; then the record goes, unless the
	// peer is back before.
	gone bool
	// replaced: another peer announced this one's address since. Its entries are passed over until they expire.
	replaced bool
}

// given returns the addresses that an asker is given: those on loopback only where it is there itself. ok is false
// where none is left.
func (p *peer) given(local bool) (a [2]netip.AddrPort, ok bool) {
	if p.replaced || p.gone {
		return a, false
	}
	for i, b := range p.addrs {
		if b.IsValid() && (local || !b.Addr().IsLoopback()) {
			a[i], ok = b, true
		}
	}
	return a, ok
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

// tick is a moment as entries keep it, in tenths of a second, rounded up so that nobody is forgotten too early. It
// lasts 13 years.
type tick uint32

const tickLength = moment(100 * time.Millisecond)

func tickOf(m moment) tick { return tick((m + tickLength - 1) / tickLength) }

func (t tick) moment() moment { return moment(t) * tickLength }

// entry is what a peer said of a blob last. There may be millions, so it has 20 bytes and no pointer. Its numbers of
// bytes are shown to people only, seven digits of them are enough; that nothing is left, or that it is not known, is
// kept exactly.
type entry struct {
	peer     number
	seen     tick
	left     float32 // -1: not known
	up, down float32
}

func (e entry) who() number { return e.peer }

// maxCount bounds the bytes that are kept of what a peer says it has moved, so that they are an int64 again when they
// are shown.
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
	trimmed  tick     // when it was looked at last for a source that has too many places
	waiting  *waiting // nil once an origin, or a metainfo, has confirmed the digest
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
	peers       int // distinct peers
	pairs       int // entries in all swarms
	swarm       int // entries in one swarm
	unconfirmed int // swarms of digests that no origin has confirmed yet

	// The same for what one source may take.
	sourcePeers, sourcePairs, sourceUnconfirmed int
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
	pairs  int // of peers that are not gone
	goners int // peers in peers that are gone
	dead   int // entries of peers that are gone

	sources map[sourceKey]*source
	greedy  [measures]ranked
	evicted int           // peers and waiting swarms, since the start
	full    chan struct{} // a sweep is wanted before its time
	digestsKnown
}

// stockTTL is how long a stock client is believed at least. Some (libtorrent among them) announce every five minutes
// whatever interval they are told.
const stockTTL = 11 * time.Minute

// newStore forgets an entry after three intervals without an announce.
func newStore(interval time.Duration, degree int, b bounds) *store {
	return &store{
		ttl: 3 * interval, stockTTL: max(3*interval, stockTTL), degree: degree, bounds: b, began: time.Now(),
		swarms: map[digest.Digest]*swarm{}, byHash: map[blob.InfoHash]*swarm{},
		peers: map[announce.PeerID]*peer{}, byAddr: map[netip.AddrPort]*peer{}, sources: map[sourceKey]*source{},
		digestsKnown: newDigestsKnown(), full: make(chan struct{}, 1),
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

// identity is who announces: what it says of itself as far as that is believed, and where it comes from.
type identity struct {
	id    announce.PeerID
	addrs [2]netip.AddrPort
	// unproven are addresses that are kept if the same peer has proven them of late, and that nobody is given
	// otherwise.
	unproven [2]netip.AddrPort
	node     string
	stock    bool
	source   sourceKey
	key      keyHash
}

// Why something is not kept, in words for the announcer.
const (
	whyForeign   = "this peer id belongs to another source that announced it first: nothing of this announce is kept"
	whyAddress   = "another source has announced this address: it is not given to others"
	whyFull      = "the limits of this tracker, or of what one source may announce, are reached: some of this announce is not kept"
	whyUnknown   = "no origin knows some of the digests: they are not kept"
	whyNotProven = "an address was not proven: announce it from itself, or have the certificate name it"
)

// outcome is what became of an announce. Its sender is answered all the same, and is only not handed out to others.
type outcome struct {
	refused int // states that were not kept
	why     string
}

// register takes an announce.
func (s *store) register(who identity, states []announce.BlobState) (out outcome) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.now()
	p, why := s.peerOf(who, now)
	out.why = why
	if p == nil {
		out.refused = len(states)
		return out
	}
	for i := range states {
		st := &states[i]
		if st.Event == announce.EventStopped {
			if w := s.swarms[st.Digest]; w != nil {
				s.drop(w, p)
			}
			continue
		}
		if why := s.update(p, st, now); why != "" {
			out.refused++
			out.why = why
		}
	}
	return out
}

// has reports whether the peer has a place in the swarm of d.
func (s *store) has(id announce.PeerID, d digest.Digest) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	p, w := s.peers[id], s.swarms[d]
	return p != nil && w != nil && w.entry(&s.roster, p) != nil
}

// peerOf finds or makes the record of an announcer. It is nil where the id is another's, or where there is no room.
func (s *store) peerOf(who identity, now moment) (p *peer, why string) {
	p = s.peers[who.id]
	switch {
	case p != nil && s.alive(p, now) && !p.belongsTo(who):
		return nil, whyForeign
	case p == nil || p.gone:
		src := s.sourceOf(who.source)
		if !s.roomForPeer(src, now) {
			s.forgetSource(src)
			return nil, whyFull
		}
		if p == nil {
			p = &peer{id: who.id, hash: hashOf(who.id)}
			s.peers[who.id] = p
			s.roster.add(p)
		} else {
			s.revive(p)
		}
		src.add(p)
	case p.source.key != who.source:
		old := p.source
		old.remove(p)
		s.sourceOf(who.source).add(p)
		s.forgetSource(old)
	}
	p.seen, p.replaced, p.stock, p.key = now, false, who.stock, who.key
	if who.node != "" {
		p.node = who.node
	}
	for i := range who.addrs {
		if w := s.readdress(p, who, i, now); w != "" {
			why = w
		}
	}
	return p, why
}

// alive reports whether the record still stands for somebody.
func (s *store) alive(p *peer, now moment) bool { return !p.gone && !s.expired(p.stock, p.seen, now) }

// belongsTo reports whether the announcer may speak for p: it shows the key that p was announced with, or, without one,
// comes from the same source.
func (p *peer) belongsTo(who identity) bool {
	if p.key != (keyHash{}) {
		return p.key == who.key
	}
	return p.source.key == who.source
}

// readdress takes the address of one family.
func (s *store) readdress(p *peer, who identity, family int, now moment) (why string) {
	a := who.addrs[family]
	if u := who.unproven[family]; u.IsValid() {
		if p.addrs[family] == u && time.Duration(now-p.proven[family]) <= s.ttl {
			return ""
		}
		why = whyNotProven
	}
	if a.IsValid() {
		// Only one process can listen at an address: who had it before has been restarted with another id.
		if other := s.byAddr[a]; other != nil && other != p {
			if s.alive(other, now) && other.source != p.source {
				a, why = netip.AddrPort{}, whyAddress
			} else {
				other.replaced = true
			}
		}
	}
	// A stock client is seen in one family at a time; an agent says both each time.
	if old := p.addrs[family]; old != a && (a.IsValid() || !who.stock) {
		if s.byAddr[old] == p {
			delete(s.byAddr, old)
		}
		p.addrs[family] = a
	}
	if a.IsValid() {
		p.proven[family] = now
		s.byAddr[a] = p
	}
	return why
}

// update returns why the state is not kept, nothing when it is.
func (s *store) update(p *peer, st *announce.BlobState, now moment) (why string) {
	w := s.swarms[st.Digest]
	var old *entry
	if w != nil {
		old = w.entry(&s.roster, p)
	}
	if old == nil {
		if why := s.roomForPair(p, w, st.Digest, now); why != "" {
			return why
		}
		w = s.swarms[st.Digest] // making room may have removed it
	}
	if w == nil {
		w = &swarm{digest: st.Digest, since: now, leechers: newMesh(st.Digest, s.degree), seeds: circle[entry]{salt: saltOf(st.Digest)}}
		if !s.isConfirmed(st.Digest) {
			s.await(w, p.source, now)
		}
		s.swarms[st.Digest] = w
	}
	if w.size == 0 {
		w.size = st.Size
	}
	w.touched(st)
	e := entryOf(p, st, now)
	switch {
	case old == nil:
		s.pairs++
		p.refs++
		p.source.pairs++
		w.place(&s.roster, e)
	case (old.left == 0) != (e.left == 0):
		w.displace(&s.roster, *old)
		w.place(&s.roster, e)
	default:
		*old = e
	}
	return ""
}

// drop removes an entry, and the swarm with its last one.
func (s *store) drop(w *swarm, p *peer) {
	e := w.entry(&s.roster, p)
	if e == nil {
		return
	}
	w.displace(&s.roster, *e)
	s.release(p)
	s.forgetEmpty(w)
}

// release counts one entry of p less. The caller has removed it, or does so before it gives up the lock.
func (s *store) release(p *peer) {
	p.refs--
	if !p.gone {
		s.pairs--
		p.source.pairs--
		return
	}
	if s.dead--; p.refs == 0 {
		s.forgetPeer(p)
	}
}

func (s *store) forgetEmpty(w *swarm) {
	if w.len() > 0 {
		return
	}
	delete(s.swarms, w.digest)
	if s.byHash[w.hash] == w {
		delete(s.byHash, w.hash)
	}
	s.unawait(w)
}

// forgetPeer removes the record of a peer without entries.
func (s *store) forgetPeer(p *peer) {
	delete(s.peers, p.id)
	s.roster.remove(p)
	s.unaddress(p)
	if p.gone {
		s.goners--
		return
	}
	p.source.remove(p)
	s.forgetSource(p.source)
}

func (s *store) unaddress(p *peer) {
	for _, a := range p.addrs {
		if s.byAddr[a] == p {
			delete(s.byAddr, a)
		}
	}
}

// learn notes what a metainfo says of a swarm, if there is one, and that the digest is a blob's.
func (s *store) learn(d digest.Digest, h blob.InfoHash, size int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.confirmed(d)
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

// atOnce is how many swarms or peers a walk looks at before it lets others in: announces don't wait for a walk, not on
// one core either.
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
		s.forgetPeer(p)
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
	s.remove(w, func(p *peer, e *entry) bool { return p.gone || s.expired(p.stock, e.seen.moment(), now) })
}

// remove takes the entries out of a swarm for which out is true, and the swarm with its last one.
func (s *store) remove(w *swarm, out func(*peer, *entry) bool) {
	gone := map[number]bool{}
	var released []*peer
	for _, members := range [2][]entry{w.seeds.members, w.leechers.first.members} {
		for i := range members {
			if p := s.roster.peers[members[i].peer]; out(p, &members[i]) {
				gone[p.number] = true
				released = append(released, p)
			}
		}
	}
	if len(gone) == 0 {
		return
	}
	w.seeds.forget(gone)
	w.leechers.forget(gone)
	for _, p := range released {
		s.release(p)
	}
	s.forgetEmpty(w)
}

// counts are what the metrics show.
func (s *store) counts() (swarms, peers, pairs int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.swarms), len(s.peers) - s.goners, s.pairs
}
