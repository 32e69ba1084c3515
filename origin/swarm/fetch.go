package swarm

import (
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"hash/maphash"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent"

	"kraken/origin/store"
	"kraken/origin/swarm/plan"
	"kraken/proto/blob"
)

// Peer is a node that may have pieces.
type Peer struct {
	ID     [20]byte // zero when not known
	Addr   netip.AddrPort
	Origin bool // an origin: only dialled by a Fetch without Sources, for origins lease better than they seed
}

// Request says what to fetch from where.
type Request struct {
	// Partial is filled. It belongs to the caller, who closes it after the Fetch.
	Partial *store.Partial
	Sources []Source
	Peers   []Peer
	// Hashes tells what the pieces hash to where the metainfo of Partial is provisional; nil otherwise.
	Hashes Hashes
}

// Hashes tells what pieces hash to of a blob that still arrives where it comes from.
type Hashes interface {
	// PieceHash blocks until the hash of piece i is known, or ctx is done.
	PieceHash(ctx context.Context, i int) ([sha1.Size]byte, error)
	// Known returns of how many pieces, from the first on, the hash is known: these have come.
	Known() int
	// Received returns how many bytes have come to who fetches the blob, as far as is known. While that changes the
	// Fetch is not given up.
	Received() int64
}

// Stats counts since the start of the Fetch.
type Stats struct {
	BytesFromPeers   int64 // verified
	BytesFromOrigins int64 // verified, from Sources
	PiecesVerified   int
	PiecesWasted     int // did not pass, and were fetched again
	Peers            int // connected now
}

// Fetch fills a partial blob. It owns what it started until Close.
type Fetch struct {
	s       *Swarm
	t       *loaded
	m       *blob.Metainfo
	part    *store.Partial
	board   *plan.Board
	windows *plan.Windows
	hashes  Hashes // nil: those of m

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup

	mu      sync.Mutex
	sources []Source
	peers   map[netip.AddrPort]*candidate
	over    bool
	err     error
	done    chan struct{}
	closing sync.Once
	kick    chan struct{} // priorities are to be set anew

	prioMu sync.Mutex
	prio   map[int]torrent.PiecePriority // of the pieces in a window or claimed, as the library was told

	progress atomic.Int64 // time of the last verified piece, in ns
	// Bytes a second, smoothed.
	rateOfPeers atomic.Int64
	rateOfAll   atomic.Int64 // of peers and Sources

	fromPeers, fromSources, pieces, wasted atomic.Int64
}

// candidate is a peer to connect to.
type candidate struct {
	Peer
	next  time.Time
	tries int
}

type origin int

const (
	fromPeer origin = iota
	fromSource
)

const (
	tick = 100 * time.Millisecond
	// yield is how long the node with the lower peer id leaves it to the other one to dial. One connection a pair is
	// enough, and the library keeps the one that the higher id dialled.
	yield = 100 * time.Millisecond
	// retryMin and retryMax bound the pauses between dials of one peer.
	retryMin, retryMax = time.Second, 10 * time.Second
	maxCandidates      = 500
	// staleAfter is after how many stall timeouts without a piece connections are made anew.
	staleAfter = 5
)

// Fetch starts to fill req.Partial and returns at once. There is one Fetch for a blob at a time: ErrBusy. It ends when
// all pieces are verified, when it fails, when ctx is done, or with Close, which must be called in any case.
func (s *Swarm) Fetch(ctx context.Context, req Request) (*Fetch, error) {
	m := req.Partial.Metainfo()
	f := &Fetch{
		s: s, m: m, part: req.Partial, board: plan.NewBoard(m, req.Partial, s.cfg.StallTimeout), windows: plan.NewWindows(m, req.Partial), hashes: req.Hashes, peers: map[netip.AddrPort]*candidate{},
		done: make(chan struct{}), kick: make(chan struct{}, 1), prio: map[int]torrent.PiecePriority{},
	}
	f.progress.Store(time.Now().UnixNano())
	f.ctx, f.cancel = context.WithCancel(ctx)
	s.loadMu.Lock()
	defer s.loadMu.Unlock()
	if s.closed {
		f.cancel()
		return nil, fmt.Errorf("fetch %s: %w", m.Digest, ErrClosed)
	}
	if m.NumPieces() == 0 {
		f.finish(nil)
		return f, nil
	}
	if t := s.find(m.InfoHash()); t != nil {
		if t.fetch.Load() != nil {
			f.cancel()
			return nil, fmt.Errorf("fetch %s: %w", m.Digest, ErrBusy)
		}
		s.drop(t) // a blob that is whole no more
	}
	s.add(m, &content{m: m, part: req.Partial, fetch: f}, f)
	if left, _ := f.board.Remaining(); left == 0 {
		f.finish(nil)
		return f, nil
	}
	f.t.use(func(lib *torrent.Torrent) {
		for i := range m.NumPieces() {
			if !f.board.Has(i) {
				lib.Piece(i).SetPriority(torrent.PiecePriorityNormal)
			}
		}
	})
	f.AddPeers(req.Peers)
	for _, src := range req.Sources {
		f.AddSource(src)
	}
	f.wg.Go(f.run)
	return f, nil
}

// run feeds peers to the library, measures, and gives up when nothing comes any more.
func (f *Fetch) run() {
	t := time.NewTicker(tick)
	defer t.Stop()
	var before, beforeAll, received int64
	reconnected := time.Now()
	f.dial()
	for {
		select {
		case <-f.ctx.Done():
			f.finish(context.Cause(f.ctx))
			return
		case <-f.done:
			return
		case <-f.kick:
			f.prioritize()
			continue
		case <-t.C:
		}
		now := f.fromPeers.Load()
		per := float64(now-before) / tick.Seconds()
		before = now
		f.rateOfPeers.Store(int64(0.9*float64(f.rateOfPeers.Load()) + 0.1*per))
		all := now + f.fromSources.Load()
		f.rateOfAll.Store(int64(0.9*float64(f.rateOfAll.Load()) + 0.1*float64(all-beforeAll)/tick.Seconds()))
		beforeAll = all
		f.prioritize()
		if f.hashes != nil && f.hashes.Received() != received {
			received = f.hashes.Received()
			f.progress.Store(time.Now().UnixNano())
		}
		if idle := f.idle(); idle > f.s.cfg.GiveUp {
			f.finish(fmt.Errorf("fetch %s: %w for %s", f.m.Digest, ErrNoProgress, idle.Round(time.Second)))
			return
		} else if limit := staleAfter * f.s.cfg.StallTimeout; idle > limit && time.Since(reconnected) > limit {
			reconnected = time.Now()
			f.reconnect()
		}
		f.dial()
	}
}

// reconnect ends the connections of a fetch that nothing comes for; dial makes them again. Once in some hundred fetches
// of a single piece the library misses that a peer has become useful, and asking it to look again does not help; a new
// connection does.
func (f *Fetch) reconnect() {
	f.t.mu.Lock()
	conns := make([]*conn, 0, len(f.t.conns))
	for c := range f.t.conns {
		conns = append(conns, c)
	}
	f.t.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
}

// hashPatience is how long a piece that has come waits for its hash. Who had the piece to give knew it.
const hashPatience = 3 * time.Second

// pieceHash returns what piece i hashes to. Where hashes follow the pieces it may wait for that.
func (f *Fetch) pieceHash(i int) ([sha1.Size]byte, error) {
	if f.hashes == nil {
		return f.m.PieceHash(i), nil
	}
	ctx, cancel := context.WithTimeout(f.ctx, hashPatience)
	defer cancel()
	h, err := f.hashes.PieceHash(ctx, i)
	if err != nil {
		return h, fmt.Errorf("hash of piece %d of %s: %w", i, f.m.Digest, err)
	}
	return h, nil
}

// idle returns the time since the last verified piece.
func (f *Fetch) idle() time.Duration { return time.Since(time.Unix(0, f.progress.Load())) }

// AddPeers adds peers to connect to; known ones stay. They are dialled again and again until they are connected.
func (f *Fetch) AddPeers(peers []Peer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range peers {
		p.Addr = netip.AddrPortFrom(p.Addr.Addr().Unmap(), p.Addr.Port())
		if !p.Addr.IsValid() || p.Addr.Port() == 0 || p.ID == f.s.id || p.Addr == f.s.Addr() {
			continue
		}
		if c := f.peers[p.Addr]; c != nil {
			if p.ID != [20]byte{} && p.ID != c.ID {
				c.ID, c.next, c.tries = p.ID, time.Now(), 0 // a new process at the old address
			}
			continue
		}
		if len(f.peers) >= maxCandidates {
			continue
		}
		c := &candidate{Peer: p, next: time.Now()}
		if p.ID != [20]byte{} && slices.Compare(f.s.id[:], p.ID[:]) < 0 {
			c.next = c.next.Add(yield)
		}
		f.peers[p.Addr] = c
	}
}

// announced returns the address at which a peer can be dialled, as a tracker or an origin said it.
func (f *Fetch) announced(id [20]byte) (netip.AddrPort, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, c := range f.peers {
		if c.ID == id {
			return c.Addr, true
		}
	}
	return netip.AddrPort{}, false
}

// dial gives the library the peers that are due and not connected. It forgets a peer that it could not reach.
func (f *Fetch) dial() {
	ids, addrs := map[[20]byte]bool{}, map[netip.AddrPort]bool{}
	f.t.mu.Lock()
	for c := range f.t.conns {
		ids[c.id], addrs[c.address.addr] = true, true
	}
	f.t.mu.Unlock()
	now := time.Now()
	var due []*address
	f.mu.Lock()
	for _, c := range f.peers {
		if addrs[c.Addr] || c.ID != [20]byte{} && ids[c.ID] {
			c.tries, c.next = 0, now.Add(retryMin)
			continue
		}
		if now.Before(c.next) || c.Origin && len(f.sources) > 0 || f.s.bans.has(c.ID, c.Addr) || f.board.Doubted(c.ID) {
			continue
		}
		c.next = now.Add(min(retryMin<<min(c.tries, 10), retryMax))
		c.tries++
		due = append(due, &address{text: dialText(c.Addr, f.m.InfoHash()), addr: c.Addr})
	}
	f.mu.Unlock()
	if len(due) == 0 {
		return
	}
	infos := make([]torrent.PeerInfo, 0, len(due))
	f.t.mu.Lock()
	for _, a := range due {
		f.t.dials[a.text] = a
		infos = append(infos, torrent.PeerInfo{Addr: a, Source: torrent.PeerSourceTracker})
	}
	f.t.mu.Unlock()
	f.t.use(func(lib *torrent.Torrent) { lib.AddPeers(infos) })
}

// SetWindow makes the length bytes from off on, which a reader will read, come first and in order. It replaces the
// window that the reader had.
func (f *Fetch) SetWindow(reader, off, length int64) {
	f.windows.Set(reader, off, length)
	f.prioritize()
}

// DropWindow makes what a reader would have read ordinary again.
func (f *Fetch) DropWindow(reader int64) {
	f.windows.Drop(reader)
	f.prioritize()
}

// windowPieces lists the missing pieces that readers wait for, the most urgent first.
func (f *Fetch) windowPieces() []int { return f.windows.Pieces(f.rateOfAll.Load()) }

// priorities are the library's words for those of a plan.
var priorities = map[plan.Priority]torrent.PiecePriority{
	plan.None: torrent.PiecePriorityNone, plan.Normal: torrent.PiecePriorityNormal,
	plan.Readahead: torrent.PiecePriorityReadahead, plan.Now: torrent.PiecePriorityNow,
}

// prioritize tells the library what is claimed by Sources, what readers wait for, and what has become ordinary again.
func (f *Fetch) prioritize() {
	if f.t == nil { // an empty blob
		return
	}
	f.prioMu.Lock()
	defer f.prioMu.Unlock()
	want := map[int]torrent.PiecePriority{}
	for i, p := range f.board.Priorities(f.windowPieces()) {
		want[i] = priorities[p]
	}
	f.t.use(func(lib *torrent.Torrent) {
		for i, p := range want {
			if old, ok := f.prio[i]; !ok || old != p {
				lib.Piece(i).SetPriority(p)
			}
		}
		for i := range f.prio {
			if _, ok := want[i]; !ok && !f.part.Has(i) {
				lib.Piece(i).SetPriority(torrent.PiecePriorityNormal)
			}
		}
	})
	f.prio = want
}

// verified counts a piece that the store has marked, and ends the fetch with the last one. Further calls for a piece do
// nothing.
func (f *Fetch) verified(i int, from origin) {
	suspects, last, first := f.board.Verified(i)
	if !first {
		return
	}
	size := f.m.PieceSize(i)
	f.pieces.Add(1)
	if from == fromPeer {
		f.fromPeers.Add(size)
		f.s.m.fromPeers.Add(float64(size))
	} else {
		f.fromSources.Add(size)
		f.s.m.fromSources.Add(float64(size))
	}
	f.progress.Store(time.Now().UnixNano())
	f.convict(i, suspects)
	if last {
		f.finish(nil)
	}
}

// convict finds out who had sent the wrong blocks of a piece, now that the right ones are there.
func (f *Fetch) convict(i int, suspects []plan.Block) {
	for _, x := range suspects {
		buf := make([]byte, x.Size)
		if _, err := f.part.ReadAt(buf, int64(i)*f.m.PieceLength()+x.Off); err != nil {
			continue
		}
		if maphash.Bytes(blockSeed, buf) != x.Sum && x.From != nil {
			x.From.Conn.Ban(fmt.Sprintf("sent a wrong block of piece %d of %s", i, f.m.Digest))
		}
	}
}

// wrongPiece counts a piece that did not pass and bans who alone sent it. Where several did, all but one are
// disconnected: the piece comes from that one, or from a Source, and tells who was right; the others come back when
// that is known.
func (f *Fetch) wrongPiece(i int, liars, doubtful []*plan.Peer) {
	f.wasted.Add(1)
	f.s.m.wasted.Inc()
	for _, p := range liars {
		p.Conn.Ban(fmt.Sprintf("sent a wrong piece %d of %s", i, f.m.Digest))
	}
	for _, p := range doubtful {
		p.Conn.Close()
	}
	if len(doubtful) > 0 {
		f.reprioritize()
	}
}

// reprioritize makes run set priorities anew. The library's callbacks can't do it themselves: they hold its lock.
func (f *Fetch) reprioritize() {
	select {
	case f.kick <- struct{}{}:
	default:
	}
}

// Done returns a channel that is closed when all pieces are verified, or the Fetch has failed.
func (f *Fetch) Done() <-chan struct{} { return f.done }

// Err returns nil before Done, and after it when all pieces are verified; else why the Fetch has failed.
func (f *Fetch) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Left returns how many bytes are missing.
func (f *Fetch) Left() int64 {
	_, n := f.board.Remaining()
	return n
}

// Stats returns what was counted so far.
func (f *Fetch) Stats() Stats {
	st := Stats{
		BytesFromPeers: f.fromPeers.Load(), BytesFromOrigins: f.fromSources.Load(),
		PiecesVerified: int(f.pieces.Load()), PiecesWasted: int(f.wasted.Load()),
	}
	if f.t == nil {
		return st
	}
	f.t.use(func(lib *torrent.Torrent) {
		st.Peers = lib.Stats().ActivePeers
	})
	return st
}

// finish ends the fetch with its result; only the first counts. It waits for nothing and may be called from anywhere.
func (f *Fetch) finish(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return
	}
	f.over = true
	if err != nil && !errors.Is(err, ErrNoProgress) {
		err = fmt.Errorf("fetch %s: %w", f.m.Digest, err)
	}
	f.err = err
	f.cancel()
	close(f.done)
}

// Close ends the Fetch and waits for what it started. When the blob is committed by now, it is seeded from the store
// on.
func (f *Fetch) Close() error {
	f.finish(ErrClosed)
	f.closing.Do(func() {
		f.wg.Wait()
		if f.t == nil {
			return
		}
		f.s.loadMu.Lock()
		defer f.s.loadMu.Unlock()
		r, err := f.s.cfg.Store.OpenYielding(f.m.Digest)
		if err != nil || f.s.closed {
			f.s.drop(f.t)
			switch {
			case err == nil:
				r.Close()
			case f.Err() == nil && !errors.Is(err, store.ErrNotFound): // it is there; a peer that asks for it makes another try
				f.s.log.Warn("a blob that came can't be opened now", "digest", f.m.Digest, "error", err)
				if !f.m.IsProvisional() {
					f.s.Register(f.m)
				}
			}
			return
		}
		f.t.data.commit(r)
		f.t.touch()
		f.t.fetch.Store(nil)
		if !f.m.IsProvisional() { // its user knows the real one by now
			f.s.Register(f.m)
		}
	})
	return nil
}
