package swarm

import (
	"slices"
	"sync"
	"time"

	"kraken/origin/store"
	"kraken/proto/blob"
)

// board is what a Fetch knows of each piece: on its way from a peer, claimed by a lease, available at connected peers.
// Its lock is taken with the library's lock held, so its methods call nothing.
type board struct {
	m    *blob.Metainfo
	part *store.Partial

	mu        sync.Mutex
	moving    map[int]*moving
	available []uint16    // connected nodes of ours that have the piece
	askedAt   []time.Time // when a peer was asked for the first block of a piece
	since     time.Time
	got       blob.Bitmap
	left      int
	leftBytes int64
	judged    chan struct{} // closed and replaced whenever a piece has passed or not
	// How long blocks take to come, and by how much that differs, smoothed (as a retransmission timer does it, RFC
	// 6298).
	wait, spread time.Duration
}

// moving is a piece on its way.
type moving struct {
	asked    int // blocks that peers were asked for and have not sent
	blocks   map[int64]block
	writing  int  // blocks being written
	claimed  bool // a Source delivers it: blocks of peers are dropped
	dropped  bool // a block was dropped since the last check
	checking bool // is checked, or has passed
	correct  *bool
	failedAt time.Time
	suspects []block // of checks that failed with several peers involved
}

// block is a part of a piece and where it came from.
type block struct {
	off, size int64
	from      *conn
	sum       uint64 // of what was received; several blocks make up the piece
}

func newBoard(m *blob.Metainfo, part *store.Partial) *board {
	b := &board{m: m, part: part, moving: map[int]*moving{}, judged: make(chan struct{}), available: make([]uint16, m.NumPieces()), askedAt: make([]time.Time, m.NumPieces())}
	b.got = part.Bitmap()
	for i := range m.NumPieces() {
		if !b.got.Has(i) {
			b.left++
			b.leftBytes += m.PieceSize(i)
		}
	}
	return b
}

func (b *board) get(i int) *moving {
	p := b.moving[i]
	if p == nil {
		p = &moving{blocks: map[int64]block{}}
		b.moving[i] = p
	}
	return p
}

// asked and unasked note a request for a block, and that it is over. They say whether the piece has become one to ask
// nobody else for, or is such a piece no more.
func (b *board) asked(i int) (taken bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.get(i)
	if p.asked == 0 {
		b.askedAt[i] = time.Now()
	}
	p.asked++
	return b.whole(i, p)
}

func (b *board) unasked(i int) (free bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.moving[i]; p != nil && p.asked > 0 {
		was := b.whole(i, p)
		p.asked--
		free = was && !b.whole(i, p)
		b.tidy(i, p)
	}
	return free
}

// tidy forgets a piece about which nothing is known any more.
func (b *board) tidy(i int, p *moving) {
	if p.asked == 0 && len(p.blocks) == 0 && p.writing == 0 && !p.claimed && !p.dropped && !p.checking && p.correct == nil && len(p.suspects) == 0 {
		delete(b.moving, i)
	}
}

// received notes who sent a block, before it is written, and returns how many blocks the peer may be asked for at once:
// a piece's worth until a piece with its help has passed, so that a liar spoils little before it is found out.
func (b *board) received(i int, off, size int64, from *conn) (ask int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.get(i).blocks[off] = block{off: off, size: size, from: from}
	if at := b.askedAt[i]; !at.IsZero() {
		b.took(time.Since(at))
	}
	from.unproven++
	from.speed.add(size, time.Now())
	return b.limit(from)
}

// took smooths how long a block took.
func (b *board) took(d time.Duration) {
	if b.wait == 0 {
		b.wait, b.spread = d, d/2
		return
	}
	b.spread += ((b.wait - d).Abs() - b.spread) / 8
	b.wait += (d - b.wait) / 16
}

// overdue is after how long a block that a peer was asked for is not counted on any more: longer than nearly all take.
// In a large crowd on slow links they take seconds, and whoever asks another peer or a Source meanwhile gets them
// twice.
func (b *board) overdue(stall time.Duration) time.Duration {
	return min(max(stall, b.wait+4*b.spread), overdueStalls*stall)
}

// overdueStalls bounds, in stall timeouts, how long a peer that hangs is counted on: longer than a block of 256 KiB
// takes that waits for two dozen others on an uplink of 2 Mbit/s.
const overdueStalls = 12

// admit returns how many blocks a new connection may be asked for at once.
func (b *board) admit(c *conn) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.limit(c)
}

func (b *board) limit(c *conn) int {
	l := b.m.PieceLength()
	size := blockSize(l)
	if l == size || c.proven {
		// A piece of one block is judged before the next message of its sender is read.
		return int(min(max(1, c.speed.in(askAhead)/size+1), inFlight/size))
	}
	return max(1, int(l/size)-c.unproven)
}

// hold is not nil while nothing more should be read from a peer: it has sent a piece's worth of blocks, and whether
// they are right is known when the channel is closed, or one of its successors.
func (b *board) hold(c *conn) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.m.PieceLength()
	size := blockSize(l)
	if l == size || c.proven || c.excused || c.unproven < int(l/size) {
		return nil
	}
	return b.judged
}

// excuse ends the holding of a peer on which no verdict has come: it may hang on others.
func (b *board) excuse(c *conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.excused = true
}

// judge wakes those who hold.
func (b *board) judge() {
	close(b.judged)
	b.judged = make(chan struct{})
}

// beginWrite says whether a peer's block may be written. endWrite follows when it may.
func (b *board) beginWrite(i int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.part.Has(i) {
		return false
	}
	p := b.get(i)
	if p.claimed || p.checking {
		p.dropped = true
		return false
	}
	p.writing++
	return true
}

func (b *board) endWrite(i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.moving[i]; p != nil && p.writing > 0 {
		p.writing--
	}
}

// wrote notes the content of a block; correct is the verdict where it is the whole piece. It returns who sent a wrong
// piece.
func (b *board) wrote(i int, off int64, sum uint64, correct *bool) []*conn {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.get(i)
	x := p.blocks[off]
	x.sum = sum
	p.blocks[off] = x
	p.correct = correct
	if correct != nil && !*correct && x.from != nil {
		return []*conn{x.from}
	}
	return nil
}

// check is what to do about a piece that the library wants checked.
type check int

const (
	checkRead check = iota // read and hash it
	checkDone              // it is right
	checkNo                // it has to be fetched again
)

// beginCheck decides; after checkRead follows failed or, when it passed, done.
func (b *board) beginCheck(i int) check {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.part.Has(i) {
		return checkDone
	}
	p := b.get(i)
	right := p.correct
	switch {
	case p.claimed || p.dropped || right != nil && !*right:
		p.dropped, p.correct = false, nil
		clear(p.blocks)
		b.tidy(i, p)
		return checkNo
	case right != nil:
		p.checking = true
		return checkDone
	}
	p.checking = true
	return checkRead
}

// failed ends a check. When one peer alone sent the piece it is returned, as a liar. Else all who did are suspects
// until the piece is there, and all but the one with the most merit are returned as doubtful.
func (b *board) failed(i int, unreadable bool) (liars, doubtful []*conn) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.get(i)
	p.checking = false
	b.judge()
	defer b.tidy(i, p)
	defer clear(p.blocks)
	if unreadable {
		return nil, nil
	}
	var from []*conn
	for _, x := range p.blocks {
		if x.from != nil && !slices.Contains(from, x.from) {
			from = append(from, x.from)
		}
	}
	if len(from) < 2 {
		return from, nil
	}
	p.failedAt = time.Now()
	for _, x := range p.blocks {
		p.suspects = append(p.suspects, x)
	}
	slices.SortFunc(from, func(x, y *conn) int { return y.merit - x.merit })
	return nil, from[1:]
}

// doubted says that a peer stays away until a piece is there that tells whether it lied, or for a while at most.
func (b *board) doubted(id [20]byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.moving {
		if time.Since(p.failedAt) > doubtTime {
			continue
		}
		for _, x := range p.suspects {
			if x.from != nil && x.from.id == id {
				return true
			}
		}
	}
	return false
}

// doubtTime bounds how long peers are kept away because they may have lied.
const doubtTime = 10 * time.Second

// failures lists the pieces that did not pass and whose senders are in doubt.
func (b *board) failures() []int {
	b.mu.Lock()
	defer b.mu.Unlock()
	var out []int
	for i, p := range b.moving {
		if len(p.suspects) > 0 {
			out = append(out, i)
		}
	}
	return out
}

// claim takes the pieces that are missing and not on their way to be delivered by a Source, and returns them. A peer
// may have been asked for one while the lease was waited for.
func (b *board) claim(pieces []int, stall time.Duration) []int {
	b.mu.Lock()
	defer b.mu.Unlock()
	now, overdue := time.Now(), b.overdue(stall)
	var out []int
	for _, i := range pieces {
		if i < 0 || i >= b.m.NumPieces() || b.part.Has(i) {
			continue
		}
		p := b.get(i)
		if p.claimed || p.writing > 0 || p.checking || b.whole(i, p) && now.Sub(b.askedAt[i]) < overdue {
			continue
		}
		p.claimed = true
		out = append(out, i)
	}
	return out
}

// release gives claimed pieces back.
func (b *board) release(pieces []int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, i := range pieces {
		if p := b.moving[i]; p != nil {
			p.claimed = false
			b.tidy(i, p)
		}
	}
}

// done notes that a piece is verified and returns the suspects that can be judged now. Only the first call for a piece
// counts.
func (b *board) done(i int) (suspects []block, last, first bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.got.Has(i) {
		return nil, false, false
	}
	b.got.Set(i)
	if p := b.moving[i]; p != nil {
		suspects = p.suspects
		for _, x := range p.blocks {
			if x.from != nil && !p.claimed {
				x.from.proven = true
				x.from.merit++
			}
		}
	}
	b.judge()
	// Late blocks are kept out by the store's bitmap from here on.
	delete(b.moving, i)
	b.left--
	b.leftBytes -= b.m.PieceSize(i)
	return suspects, b.left == 0, true
}

// remaining is what is missing.
func (b *board) remaining() (pieces int, bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.left, b.leftBytes
}

func (b *board) has(i int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.got.Has(i)
}

// gained and lost count the connected peers that have pieces.
func (b *board) gained(i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.since.IsZero() {
		b.since = time.Now()
	}
	b.available[i]++
}

func (b *board) lost(i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.available[i]--
}

// view is what a lease is asked with.
type view struct {
	have    blob.Bitmap // pieces that need not be leased
	want    []int       // of the windows, the ones that should be leased, in order
	missing int         // pieces that are not in have
}

// whole says that peers were asked for all blocks of a piece that are not here.
func (b *board) whole(i int, p *moving) bool {
	size := blockSize(b.m.PieceLength())
	return p.asked > 0 && int64(p.asked+len(p.blocks)) >= (b.m.PieceSize(i)+size-1)/size
}

// taken lists the pieces that nobody else should be asked for: Sources deliver them, or peers were asked for all that
// is missing, not so long ago that it is overdue.
func (b *board) taken(stall time.Duration) []int {
	b.mu.Lock()
	defer b.mu.Unlock()
	now, overdue := time.Now(), b.overdue(stall)
	var out []int
	for i, p := range b.moving {
		if p.claimed || b.whole(i, p) && now.Sub(b.askedAt[i]) < overdue {
			out = append(out, i)
		}
	}
	return out
}

// look decides which pieces to ask a Source for: not what is here or on its way, and not what peers have and will
// deliver soon. windows are the pieces that readers wait for, in order. budget is how many bytes peers are trusted to
// deliver; a piece that is overdue at a peer is not counted on.
func (b *board) look(windows []int, budget int64, stall time.Duration) view {
	b.mu.Lock()
	defer b.mu.Unlock()
	now, overdue := time.Now(), b.overdue(stall)
	v := view{have: b.part.Bitmap()}
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
		if v.have.Has(i) {
			continue
		}
		if take(i) {
			v.want = append(v.want, i)
		} else {
			v.have.Set(i)
		}
	}
	wanted := make(map[int]bool, len(v.want))
	for _, i := range v.want {
		wanted[i] = true
	}
	for i := range b.m.NumPieces() {
		if !v.have.Has(i) && !wanted[i] && !take(i) {
			v.have.Set(i)
		}
	}
	v.missing = v.have.Len() - v.have.Count()
	return v
}

// availableSince is when the first connected peer with pieces came; zero when there was none.
func (b *board) availableSince() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.since
}
