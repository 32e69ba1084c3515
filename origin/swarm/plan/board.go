package plan

import (
	"maps"
	"slices"
	"sync"
	"time"

	"kraken/proto/blob"
)

// Board holds what is known of each piece of a blob that is fetched: on its way from a peer, claimed for a Source,
// available at connected peers. It is safe for concurrent use. The wire calls it with the BitTorrent library's lock
// held, so its methods call nothing but its Pieces.
type Board struct {
	m     *blob.Metainfo
	part  Pieces
	stall time.Duration

	mu        sync.Mutex
	moving    map[int]*moving
	available []uint16    // connected nodes of ours that have the piece
	askedAt   []time.Time // when a peer was asked for the first block of a piece
	since     time.Time   // when the first connected peer with pieces came
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
	blocks   map[int64]Block
	writing  int  // blocks being written
	claimed  bool // a Source delivers it: blocks of peers are dropped
	dropped  bool // a block was dropped since the last check
	checking bool // is checked, or has passed
	verdict  verdict
	failedAt time.Time
	suspects []Block // of checks that failed with several peers involved
}

// verdict is what is known of a piece that came as one block.
type verdict int

const (
	unjudged verdict = iota
	right
	wrong
)

// Block is a part of a piece and where it came from.
type Block struct {
	Off, Size int64  // in bytes, within the piece
	From      *Peer  // nil: not known
	Sum       uint64 // of what was received, as Wrote was told
}

// NewBoard returns the Board of a fetch that begins now with what part has. stall is for how long a fetch, or one peer,
// may bring nothing before others are asked.
func NewBoard(m *blob.Metainfo, part Pieces, stall time.Duration) *Board {
	b := &Board{
		m: m, part: part, stall: stall, moving: map[int]*moving{}, judged: make(chan struct{}),
		available: make([]uint16, m.NumPieces()), askedAt: make([]time.Time, m.NumPieces()),
	}
	b.got = part.Bitmap()
	for i := range m.NumPieces() {
		if !b.got.Has(i) {
			b.left++
			b.leftBytes += m.PieceSize(i)
		}
	}
	return b
}

// get returns what is known of piece i, and begins to know it. The caller holds b.mu.
func (b *Board) get(i int) *moving {
	p := b.moving[i]
	if p == nil {
		p = &moving{blocks: map[int64]Block{}}
		b.moving[i] = p
	}
	return p
}

// Asked notes that a peer was asked for a block of piece i. It returns whether the piece is one to ask nobody else for
// now.
func (b *Board) Asked(i int) (taken bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p := b.get(i)
	if p.asked == 0 {
		b.askedAt[i] = time.Now()
	}
	p.asked++
	return b.fullyRequested(i, p)
}

// Unasked notes that a request for a block of piece i is over. It returns whether that makes the piece one to ask
// others for again.
func (b *Board) Unasked(i int) (free bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.moving[i]; p != nil && p.asked > 0 {
		was := b.fullyRequested(i, p)
		p.asked--
		free = was && !b.fullyRequested(i, p)
		b.tidy(i, p)
	}
	return free
}

// tidy forgets a piece about which nothing is known any more. The caller holds b.mu.
func (b *Board) tidy(i int, p *moving) {
	if p.asked == 0 && len(p.blocks) == 0 && p.writing == 0 && !p.claimed && !p.dropped && !p.checking && p.verdict == unjudged && len(p.suspects) == 0 {
		delete(b.moving, i)
	}
}

// Received notes who sent a block of size bytes at off in piece i, before it is written, and returns how many blocks
// the peer may be asked for at once: a piece's worth until a piece with its help has passed, so that a liar spoils
// little before it is found out.
func (b *Board) Received(i int, off, size int64, from *Peer) (ask int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.get(i).blocks[off] = Block{Off: off, Size: size, From: from}
	if at := b.askedAt[i]; !at.IsZero() {
		b.took(time.Since(at))
	}
	from.unproven++
	from.speed.add(size, time.Now())
	return b.limit(from)
}

// took adds to the smoothed time that blocks take. The caller holds b.mu.
func (b *Board) took(d time.Duration) {
	if b.wait == 0 {
		b.wait, b.spread = d, d/2
		return
	}
	b.spread += ((b.wait - d).Abs() - b.spread) / 8
	b.wait += (d - b.wait) / 16
}

// overdue returns after how long a block that a peer was asked for is not counted on any more: longer than nearly all
// take. In a large crowd on slow links they take seconds, and whoever asks another peer or a Source meanwhile gets them
// twice. The caller holds b.mu.
func (b *Board) overdue() time.Duration {
	return min(max(b.stall, b.wait+4*b.spread), overdueStalls*b.stall)
}

// overdueStalls bounds, in stall timeouts, how long a peer that hangs is counted on: longer than a block of 256 KiB
// takes that waits for two dozen others on an uplink of 2 Mbit/s.
const overdueStalls = 12

// Admit returns how many blocks a peer that was just connected may be asked for at once.
func (b *Board) Admit(c *Peer) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.limit(c)
}

// limit returns how many blocks a peer may be asked for at once. The caller holds b.mu.
func (b *Board) limit(c *Peer) int {
	l := b.m.PieceLength()
	size := BlockSize(l)
	if l == size || c.proven {
		// A piece of one block is judged before the next message of its sender is read.
		return int(min(max(1, c.speed.in(askAhead)/size+1), MaxInFlight/size))
	}
	return max(1, int(l/size)-c.unproven)
}

// Hold returns nil when more may be read from a peer. Else it has sent a piece's worth of blocks, and whether they are
// right may be known once the channel that is returned is closed: ask again then.
func (b *Board) Hold(c *Peer) <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	l := b.m.PieceLength()
	size := BlockSize(l)
	if l == size || c.proven || c.excused || c.unproven < int(l/size) {
		return nil
	}
	return b.judged
}

// Excuse ends for ever that a peer is held: a verdict that does not come may hang on others.
func (b *Board) Excuse(c *Peer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	c.excused = true
}

// judge wakes those whom Hold made wait. The caller holds b.mu.
func (b *Board) judge() {
	close(b.judged)
	b.judged = make(chan struct{})
}

// BeginWrite reports whether a peer's block of piece i may be written: not when the piece is here, is claimed for a
// Source or is being checked. EndWrite must follow where it may.
func (b *Board) BeginWrite(i int) bool {
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

// EndWrite follows a BeginWrite that was true.
func (b *Board) EndWrite(i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if p := b.moving[i]; p != nil && p.writing > 0 {
		p.writing--
	}
}

// Wrote notes the sum of a block at off, one of several of piece i.
func (b *Board) Wrote(i int, off int64, sum uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wrote(i, off, sum)
}

// WroteWhole notes whether piece i, which came as one block, is right. It returns who sent a wrong one, nil: nobody, or
// not known.
func (b *Board) WroteWhole(i int, passed bool) (liar *Peer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, x := b.wrote(i, 0, 0)
	if passed {
		p.verdict = right
		return nil
	}
	p.verdict = wrong
	return x.From
}

// wrote keeps a block's sum. The caller holds b.mu.
func (b *Board) wrote(i int, off int64, sum uint64) (*moving, Block) {
	p := b.get(i)
	x := p.blocks[off]
	x.Sum = sum
	p.blocks[off] = x
	p.verdict = unjudged
	return p, x
}

// Check is what to do about a piece that the library wants checked.
type Check int

const (
	CheckRead Check = iota // read and hash it
	CheckDone              // it is right
	CheckNo                // it has to be fetched again
)

// BeginCheck returns how to check piece i. After CheckRead one of Verified, Failed and Unreadable must follow.
func (b *Board) BeginCheck(i int) Check {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.part.Has(i) {
		return CheckDone
	}
	p := b.get(i)
	switch {
	case p.claimed || p.dropped || p.verdict == wrong:
		p.dropped, p.verdict = false, unjudged
		clear(p.blocks)
		b.tidy(i, p)
		return CheckNo
	case p.verdict == right:
		p.checking = true
		return CheckDone
	}
	p.checking = true
	return CheckRead
}

// Unreadable ends a check of a piece that could not be read back: nobody is to blame.
func (b *Board) Unreadable(i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.endCheck(i)
}

// endCheck forgets the blocks of a piece that has to be fetched again, and returns them. The caller holds b.mu.
func (b *Board) endCheck(i int) (p *moving, blocks []Block) {
	p = b.get(i)
	p.checking = false
	b.judge()
	blocks = slices.Collect(maps.Values(p.blocks))
	clear(p.blocks)
	b.tidy(i, p)
	return p, blocks
}

// Failed ends a check of a piece with a wrong hash. When one peer alone sent the piece it is returned, as a liar. Else
// all who did are suspects until the piece is there, and all but the one with the most merit are returned as doubtful.
func (b *Board) Failed(i int) (liars, doubtful []*Peer) {
	b.mu.Lock()
	defer b.mu.Unlock()
	p, blocks := b.endCheck(i)
	var from []*Peer
	for _, x := range blocks {
		if x.From != nil && !slices.Contains(from, x.From) {
			from = append(from, x.From)
		}
	}
	if len(from) < 2 {
		return from, nil
	}
	p.failedAt = time.Now()
	p.suspects = append(p.suspects, blocks...)
	b.moving[i] = p
	slices.SortFunc(from, func(x, y *Peer) int { return y.merit - x.merit })
	return nil, from[1:]
}

// Doubted reports whether a peer has to stay away: until a piece is there that tells whether it lied, or for doubtTime.
func (b *Board) Doubted(id [20]byte) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, p := range b.moving {
		if time.Since(p.failedAt) > doubtTime {
			continue
		}
		for _, x := range p.suspects {
			if x.From != nil && x.From.ID == id {
				return true
			}
		}
	}
	return false
}

// doubtTime bounds how long peers are kept away because they may have lied.
const doubtTime = 10 * time.Second

// Claim takes those of pieces that are missing and not on their way, to be delivered by a Source, and returns them. The
// others were asked of a peer, or came, while the lease was waited for; one that came right only waits for its check.
// Release gives back what was not delivered.
func (b *Board) Claim(pieces []int) []int {
	b.mu.Lock()
	defer b.mu.Unlock()
	now, overdue := time.Now(), b.overdue()
	var out []int
	for _, i := range pieces {
		if i < 0 || i >= b.m.NumPieces() || b.part.Has(i) {
			continue
		}
		p := b.get(i)
		if p.claimed || p.writing > 0 || p.checking || p.verdict == right || b.fullyRequested(i, p) && now.Sub(b.askedAt[i]) < overdue {
			continue
		}
		p.claimed = true
		out = append(out, i)
	}
	return out
}

// Release gives claimed pieces back.
func (b *Board) Release(pieces []int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, i := range pieces {
		if p := b.moving[i]; p != nil {
			p.claimed = false
			b.tidy(i, p)
		}
	}
}

// Verified notes that piece i is verified. It returns the blocks whose senders can be judged now, and whether no piece
// is missing any more. Only the first call for a piece counts: first is false for others.
func (b *Board) Verified(i int) (suspects []Block, last, first bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.got.Has(i) {
		return nil, false, false
	}
	b.got.Set(i)
	if p := b.moving[i]; p != nil {
		suspects = p.suspects
		for _, x := range p.blocks {
			if x.From != nil && !p.claimed {
				x.From.proven = true
				x.From.merit++
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

// Remaining returns how many pieces and bytes are missing.
func (b *Board) Remaining() (pieces int, bytes int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.left, b.leftBytes
}

// Has reports whether piece i was verified, before or since the Board was made.
func (b *Board) Has(i int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.got.Has(i)
}

// Gained notes that a connected peer has piece i.
func (b *Board) Gained(i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.since.IsZero() {
		b.since = time.Now()
	}
	b.available[i]++
}

// Lost notes that a peer which had piece i is gone.
func (b *Board) Lost(i int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.available[i]--
}

// fullyRequested reports whether peers were asked for all blocks of a piece that are not here. The caller holds b.mu.
func (b *Board) fullyRequested(i int, p *moving) bool {
	size := BlockSize(b.m.PieceLength())
	return p.asked > 0 && int64(p.asked+len(p.blocks)) >= (b.m.PieceSize(i)+size-1)/size
}

// PeersSince returns when the first connected peer with pieces came; zero when there was none.
func (b *Board) PeersSince() time.Time {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.since
}
