package plan

import (
	"math/rand/v2"
	"slices"
	"time"

	"kraken/proto/blob"
)

const (
	// A lease is sized to be read in leaseTime.
	leaseTime = 200 * time.Millisecond
	// The first lease is a piece or so: what a reader waits for should share a slow link with little else, and of a
	// crowd each gets something to trade that much sooner.
	leaseFirst, leaseLimit = 128 << 10, 16 << 20 // bytes
	maxLease               = 256                 // pieces; the protocol's limit
	// horizon is for how long peers are trusted to deliver at their rate; new peers are trusted without one for grace.
	horizon, grace = 2 * time.Second, time.Second
	// MinPause is the shortest pause of a worker that has nothing to read.
	MinPause = 50 * time.Millisecond
	// After maxHeldBack answers of HeldBack in a row pieces are read without leases.
	maxHeldBack = 4
	// A Source that has sent maxWrong wrong pieces is not used any more.
	maxWrong = 3
)

// View is what a Source is asked for a lease with.
type View struct {
	Have    blob.Bitmap // pieces that need not be leased
	Want    []int       // of the windows, the ones that should be leased, in order
	Missing int         // pieces that are not in Have
	Came    int         // the pieces before this one have come where the blob comes from; others can't be read without a lease
}

// Look returns which pieces to ask a Source for: not what is here or on its way, and not what peers have and will
// deliver soon. windows are the pieces that readers wait for, in order. budget is how many bytes peers are trusted to
// deliver; a piece that is overdue at a peer is not counted on.
func (b *Board) Look(windows []int, budget int64) View {
	b.mu.Lock()
	defer b.mu.Unlock()
	now, overdue := time.Now(), b.overdue()
	v := View{Have: b.part.Bitmap()}
	take := func(i int) bool {
		if p := b.moving[i]; p != nil {
			if p.claimed || p.writing > 0 || p.checking {
				return false
			}
			if p.asked > 0 && now.Sub(b.askedAt[i]) < overdue {
				return false
			}
			if len(p.suspects) > 0 {
				return true // a Source will tell who is right
			}
		}
		if n := b.m.PieceSize(i); b.available[i] > 0 && budget >= n {
			budget -= n
			return false
		}
		return true
	}
	for _, i := range windows {
		if v.Have.Has(i) {
			continue
		}
		if take(i) {
			v.Want = append(v.Want, i)
		} else {
			v.Have.Set(i)
		}
	}
	wanted := make(map[int]bool, len(v.Want))
	for _, i := range v.Want {
		wanted[i] = true
	}
	for i := range b.m.NumPieces() {
		if !v.Have.Has(i) && !wanted[i] && !take(i) {
			v.Have.Set(i)
		}
	}
	v.Missing, v.Came = v.Have.Len()-v.Have.Count(), v.Have.Len()
	return v
}

// Budget returns how many bytes the connected peers are expected to deliver soon. rate is what they delivered lately,
// in bytes a second.
func (b *Board) Budget(rate int64) int64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.since.IsZero() || time.Since(b.since) < grace {
		return b.m.Size
	}
	return int64(float64(rate) * horizon.Seconds())
}

// firstMissing lists the n most urgent pieces that have come and are not in Have.
func (v View) firstMissing(n int) (out []int) {
	for _, i := range v.Want {
		if i < v.Came && len(out) < n {
			out = append(out, i)
		}
	}
	for i := 0; i < v.Came && len(out) < n; i++ {
		if !v.Have.Has(i) && !slices.Contains(v.Want, i) {
			out = append(out, i)
		}
	}
	return out
}

// someMissing lists up to n neighbouring pieces that have come and are not in Have, from any on: if all agents of a
// crowd read the same pieces they would have nothing to trade.
func (v View) someMissing(n int) (out []int) {
	missing := 0
	for i := range v.Came {
		if !v.Have.Has(i) {
			missing++
		}
	}
	if missing == 0 {
		return nil
	}
	skip := rand.IntN(missing)
	for i := range v.Came {
		switch {
		case !v.Have.Has(i) && skip > 0:
			skip--
		case !v.Have.Has(i):
			if out = append(out, i); len(out) == n {
				return out
			}
		case len(out) > 0:
			return out
		}
	}
	return out
}

// Answer is how a Source answered a request for a lease.
type Answer int

const (
	Leased      Answer = iota // with pieces, or with none: later
	HeldBack                  // this node, or others behind its address, hold leases that they do not fetch
	NotLeased                 // the Source does not lease the blob, and serves what it has of it from the begin on
	Unreachable               // the Source could not be asked
)

// Reply is an Answer and what came with it.
type Reply struct {
	Answer     Answer
	Pieces     []int
	RetryAfter time.Duration
}

// Leasing decides for one worker of one Source what to lease and to read. One goroutine uses it.
type Leasing struct {
	pieceLength int64
	stall       time.Duration
	size        int64 // of the next lease, in bytes
	asked       int   // pieces, at most, of the last request
	fails       int   // in a row
	wrong       int
	heldBack    int       // answers of HeldBack in a row
	answered    time.Time // when the Source last answered, be it with "later"
}

// NewLeasing returns the Leasing of a worker that begins now. stall is for how long a Source may be silent, and a fetch
// bring nothing, before pieces are read without a lease.
func NewLeasing(pieceLength int64, stall time.Duration) *Leasing {
	return &Leasing{pieceLength: pieceLength, stall: stall, size: leaseFirst, answered: time.Now()}
}

// Another returns the Leasing of a second worker of the same Source, which begins with leases of this one's size.
func (l *Leasing) Another() *Leasing {
	next := NewLeasing(l.pieceLength, l.stall)
	next.size = l.size
	return next
}

// Ask returns how many pieces to ask for at most.
func (l *Leasing) Ask() int {
	l.asked = int(min(max(l.size/l.pieceLength, 1), maxLease))
	return l.asked
}

// Next returns the pieces to read now, or for how long to pause before the Source is asked again. v is what it was
// asked with, and idle the time since the last piece was verified.
//
// A Source that answers "later" is not stalled, however long nothing comes: in a large crowd on slow links the first
// pieces take many seconds to reach all, and agents that read what they like meanwhile keep the origin from sending
// what nobody has yet.
func (l *Leasing) Next(v View, r Reply, idle time.Duration) (pieces []int, pause time.Duration) {
	silent := time.Since(l.answered)
	if r.Answer != Unreachable {
		l.answered = time.Now()
	}
	if l.heldBack++; r.Answer != HeldBack {
		l.heldBack = 0
	}
	switch {
	case r.Answer == Leased && len(r.Pieces) > 0:
		return r.Pieces, r.RetryAfter
	case r.Answer == Leased, r.Answer == HeldBack && l.heldBack < maxHeldBack:
		return nil, max(r.RetryAfter, MinPause)
	case r.Answer == HeldBack:
		return v.someMissing(l.asked), 0
	case idle >= l.stall && r.Answer == NotLeased:
		return v.firstMissing(l.asked), 0
	case idle >= l.stall && silent >= l.stall:
		return v.someMissing(l.asked), 0
	}
	return nil, l.Failed()
}

// Failed returns for how long to pause after the Source could not be asked, or did not deliver: longer each time in a
// row.
func (l *Leasing) Failed() time.Duration {
	d := 250 * time.Millisecond << min(l.fails, 5)
	l.fails++
	return min(d, 5*time.Second)
}

// Wrong notes a piece from the Source that did not pass, and reports whether to leave the Source alone from now on.
func (l *Leasing) Wrong() (giveUp bool) {
	l.wrong++
	return l.wrong >= maxWrong
}

// Delivered notes that a lease of n bytes was read, and makes the next one last about leaseTime.
func (l *Leasing) Delivered(n int64, took time.Duration) {
	l.fails = 0
	switch {
	case took < leaseTime/2 && n >= l.size/2:
		l.size = min(l.size*2, leaseLimit)
	case took > leaseTime*2:
		l.size = max(l.size/2, l.pieceLength)
	}
}
