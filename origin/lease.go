package origin

import (
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

const (
	// leaseFor is how long a piece that was leased and not fetched counts against who leased it.
	leaseFor = 10 * time.Second
	// againAfter is how long a piece that was sent is not sent again: agents trade it meanwhile. It is also how long a
	// replica leaves the pieces that another one leads with to that one: else each piece would be sent once by each.
	againAfter = 3 * time.Second
	// leadTime is how long a piece that a reader waits for first of all is left to the replica that leads with it. That
	// one may be busy or not have hashed the blob yet, and the reader would see it.
	leadTime = 50 * time.Millisecond
	// turnRetryAfter is the RetryAfter of an answer to an agent whose turn did not come within turnWait.
	turnRetryAfter = 10 * time.Millisecond
	// stripe is how many neighbouring pieces one replica leads with, so that agents read long ranges.
	stripe = 4
)

// leases hands out each piece of a blob once, then the ones sent least: an ordinary seed sends most pieces again and
// again while its uplink is what everybody waits for. It keeps counts per blob and nothing per agent.
type leases struct {
	limit int // agents answered at once for one blob
	now   func() time.Time
	// spread is how long a piece of a length that was sent needs to reach those who trade it, nil: not more than
	// againAfter.
	spread func(piece int64) time.Duration

	mu    sync.Mutex
	blobs map[digest.Digest]*lease
}

type lease struct {
	sent    []uint16    // how often a piece was leased
	at      []time.Time // when it was leased last; zero for never
	fetched []uint16    // how often its range was asked for
	began   time.Time   // of the first lease; zero before
	used    time.Time
	asking  int
}

func newLeases(limit int) *leases {
	return &leases{limit: limit, now: time.Now, blobs: map[digest.Digest]*lease{}}
}

// countsFor returns the send counts of a blob and creates them on first use. The caller holds l.mu.
func (l *leases) countsFor(m *blob.Metainfo) *lease {
	b := l.blobs[m.Digest]
	if b == nil {
		n := m.NumPieces()
		b = &lease{sent: make([]uint16, n), at: make([]time.Time, n), fetched: make([]uint16, n)}
		l.blobs[m.Digest] = b
	}
	b.used = l.now()
	return b
}

// hand names up to r.Max pieces. replica is this origin's place among the owners: replicas begin with different pieces.
func (l *leases) hand(m *blob.Metainfo, have blob.Bitmap, r cluster.LeaseRequest, replica, replicas int) (out cluster.LeaseResponse) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.choose(m, have, r, replica, replicas)
}

// offers reports whether hand would name a piece.
func (l *leases) offers(m *blob.Metainfo, have blob.Bitmap, r cluster.LeaseRequest, replica, replicas int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.now()
	b := l.countsFor(m)
	b.expire(now)
	for i := range b.sent {
		if !have.Has(i) && (r.Stalled || b.sent[i] == 0 && b.began.IsZero() || b.due(i, now, l.againAfter(m), i/stripe%max(1, replicas) == replica)) {
			return true
		}
	}
	return false
}

// againAfter is how long a piece that was sent is left to trade.
func (l *leases) againAfter(m *blob.Metainfo) time.Duration {
	if l.spread == nil {
		return againAfter
	}
	return max(againAfter, l.spread(m.PieceLength()))
}

// choose is hand. The caller holds mu.
func (l *leases) choose(m *blob.Metainfo, have blob.Bitmap, r cluster.LeaseRequest, replica, replicas int) (out cluster.LeaseResponse) {
	now := l.now()
	b := l.countsFor(m)
	if b.began.IsZero() {
		b.began = now
	}
	out.Expires = fetchWithin
	taken := map[int]bool{}
	give := func(i int) bool {
		if len(out.Pieces) >= r.Max {
			return false
		}
		if i < 0 || i >= m.NumPieces() || have.Has(i) || taken[i] {
			return true
		}
		taken[i] = true
		b.sent[i]++
		b.at[i] = now
		out.Pieces = append(out.Pieces, i)
		return true
	}
	b.expire(now)
	again := l.againAfter(m)
	due := func(i int) bool { return b.due(i, now, again, i/stripe%max(1, replicas) == replica) }
	if len(r.Want) > 0 {
		if i := r.Want[0]; i >= 0 && i < len(b.sent) && b.sent[i] == 0 && now.Sub(b.began) > leadTime && !give(i) {
			return out
		}
	}
	for k, i := range r.Want {
		if i < 0 || i >= len(b.sent) {
			continue
		}
		// Nobody can trade what an agent waits for that is alone; only this piece, for all agents of a flash crowd
		// are alone at first.
		if alone := k == 0 && r.Alone && b.sent[i] > 0; (alone || due(i)) && !give(i) {
			return out
		}
	}
	order := make([]int, 0, len(b.sent))
	for i := range b.sent {
		if !have.Has(i) && due(i) {
			order = append(order, i)
		}
	}
	slices.SortStableFunc(order, func(x, y int) int { return int(b.sent[x]) - int(b.sent[y]) })
	for _, i := range order {
		if !give(i) {
			return out
		}
	}
	if r.Stalled && len(out.Pieces) == 0 {
		if i, ok := anyMissing(have); ok {
			give(i)
		}
	}
	if len(out.Pieces) == 0 {
		out.RetryAfter = 250 * time.Millisecond
	}
	return out
}

// due reports whether piece i is no longer left to others: once it was sent, to agents that trade it, for the time
// again; before, to the replica that leads with it, which is this one or not.
func (b *lease) due(i int, now time.Time, again time.Duration, leads bool) bool {
	if b.sent[i] > 0 {
		return now.Sub(b.at[i]) > again
	}
	return leads || now.Sub(b.began) > againAfter
}

// expire makes pieces count as not sent that were leased and not fetched in time.
func (b *lease) expire(now time.Time) {
	for i := range b.sent {
		if b.sent[i] > b.fetched[i] && now.Sub(b.at[i]) > fetchWithin {
			b.sent[i] = b.fetched[i]
		}
	}
}

// handAside names pieces as hand does, for an agent that does not fetch what it leases: they don't count as sent, so
// that nobody is kept from them.
func (l *leases) handAside(m *blob.Metainfo, have blob.Bitmap, r cluster.LeaseRequest, replica, replicas int) cluster.LeaseResponse {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.countsFor(m)
	at, began := slices.Clone(b.at), b.began
	out := l.choose(m, have, r, replica, replicas)
	for _, i := range out.Pieces {
		b.sent[i]--
		b.at[i] = at[i]
	}
	b.began = began
	return out
}

// anyMissing returns a piece that is not in have, each with the same chance: agents that are all stalled are not to be
// sent the same one.
func anyMissing(have blob.Bitmap) (i int, ok bool) {
	left := have.Len() - have.Count()
	if left <= 0 {
		return 0, false
	}
	for skip := rand.IntN(left); ; i++ {
		if have.Has(i) {
			continue
		}
		if skip == 0 {
			return i, true
		}
		skip--
	}
}

// enter admits one more agent to a blob, false when it has to come back later.
func (l *leases) enter(m *blob.Metainfo) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.countsFor(m)
	if b.asking >= l.limit {
		return false
	}
	b.asking++
	return true
}

func (l *leases) leave(d digest.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b := l.blobs[d]; b != nil && b.asking > 0 {
		b.asking--
	}
}

// sending notes that a range of a blob is being read: the leases of its pieces are used. It returns how many bytes of
// leased pieces that is, 0 for a read of another kind.
func (l *leases) sending(d digest.Digest, r registry.Range, size int64) (n int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	b := l.blobs[d]
	if b == nil || r.Length < 0 {
		return 0
	}
	pl := blob.PieceLength(size)
	for i := r.Offset / pl; i < int64(len(b.fetched)) && i*pl < r.Offset+r.Length; i++ {
		b.fetched[i] = max(b.fetched[i], b.sent[i])
	}
	return max(0, min(r.Length, size-r.Offset))
}

// adopt takes over what was counted of a blob while it came: it is whole now.
func (l *leases) adopt(d digest.Digest, from *leases) {
	from.mu.Lock()
	b := from.blobs[d]
	if b == nil {
		from.mu.Unlock()
		return
	}
	own := &lease{sent: slices.Clone(b.sent), at: slices.Clone(b.at), fetched: slices.Clone(b.fetched), began: b.began, used: b.used}
	from.mu.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if there := l.blobs[d]; there != nil {
		own.asking = there.asking
	}
	l.blobs[d] = own
}

// forget drops the counts of blobs that nobody has asked for lately.
func (l *leases) forget(idle time.Duration) {
	limit := l.now().Add(-idle)
	l.mu.Lock()
	defer l.mu.Unlock()
	for d, b := range l.blobs {
		if b.used.Before(limit) {
			delete(l.blobs, d)
		}
	}
}

func (l *leases) drop(d digest.Digest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.blobs, d)
}
