package swarm

import (
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/types"

	"kraken/origin/store"
	"kraken/proto/blob"
)

// LeaseRequest asks a source for pieces.
type LeaseRequest struct {
	Have blob.Bitmap
	Want []int // pieces that a reader waits for, most urgent first
	Max  int
	// Again makes pieces welcome that were sent to others already: nobody here is left to trade with.
	Again bool
}

// Source is an origin that hands out pieces over HTTP. Each piece it leases is to be fetched now.
type Source interface {
	Name() string
	// Lease names pieces to fetch, or when to ask again.
	Lease(ctx context.Context, m *blob.Metainfo, r LeaseRequest) (pieces []int, retryAfter time.Duration, err error)
	ReadRange(ctx context.Context, m *blob.Metainfo, off, n int64) (io.ReadCloser, error)
}

// Request is what to fetch and from whom. Peers may be added later.
type Request struct {
	Partial *store.Partial
	Sources []Source
	Peers   []Peer
}

// Stats counts a fetch.
type Stats struct {
	BytesFromPeers   int64 // payload of verified pieces
	BytesFromOrigins int64
	PiecesWasted     int64 // failed their hash
}

// Fetch is one blob on its way. Its owner calls Close.
type Fetch struct {
	s    *Swarm
	m    *blob.Metainfo
	part *store.Partial
	l    *loaded

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
	done   chan struct{}

	fromPeers, fromOrigins, wasted atomic.Int64
	progress                       atomic.Int64 // Unix nanoseconds of the last byte that came

	mu      sync.Mutex
	err     error
	ended   bool
	left    int // pieces
	have    blob.Bitmap
	leased  map[int]bool // being fetched from a source
	windows map[int64]window
	prio    []types.PiecePriority
	peers   map[Peer]bool
	from    map[int]map[[20]byte]bool // who has sent blocks of a piece that is not verified yet
	blocks  map[[20]byte]int          // how many blocks a peer has sent
	began   time.Time
}

// window is where a reader reads, in pieces.
type window struct{ first, end int }

const (
	// leaseBytes is how much one lease asks for.
	leaseBytes = 4 << 20
	// stalled is after how long without a byte sources are asked for pieces that others have.
	stalled = time.Second
	// leaseWorkers is how many leases are fetched at once from one source.
	leaseWorkers = 2
	// urgent is how many pieces of a window come before all others.
	urgent = 2
)

// Fetch begins to fetch what the partial blob lacks. There is at most one fetch of a blob at a time.
func (s *Swarm) Fetch(ctx context.Context, r Request) (*Fetch, error) {
	m := r.Partial.Metainfo()
	f := &Fetch{
		s: s, m: m, part: r.Partial, done: make(chan struct{}), have: r.Partial.Bitmap(),
		leased: map[int]bool{}, windows: map[int64]window{}, peers: map[Peer]bool{}, from: map[int]map[[20]byte]bool{}, blocks: map[[20]byte]int{}, began: time.Now(), prio: make([]types.PiecePriority, m.NumPieces()),
	}
	f.left = m.NumPieces() - f.have.Count()
	f.progress.Store(nowNanos())
	f.ctx, f.cancel = context.WithCancel(ctx)
	l := &loaded{storage: &pieces{m: m, part: r.Partial, fetch: f}, fetch: f, used: time.Now()}
	f.l = l
	s.mu.Lock()
	old := s.loaded[m.InfoHash()]
	if old != nil && old.fetch != nil {
		s.mu.Unlock()
		f.cancel()
		return nil, fmt.Errorf("fetch %s: %w", m.Digest, store.ErrBusy)
	}
	s.loaded[m.InfoHash()] = l
	s.mu.Unlock()
	if old != nil {
		old.drop()
	}
	s.fetches.Store(m.InfoHash(), f)
	l.t = s.add(m, l.storage)
	if f.left == 0 {
		f.finish(nil)
	}
	f.mu.Lock()
	changes := f.reprioritize()
	f.mu.Unlock()
	f.apply(changes)
	f.AddPeers(r.Peers)
	f.wg.Go(f.tend)
	for _, src := range r.Sources {
		for range leaseWorkers {
			f.wg.Go(func() { f.lease(src) })
		}
	}
	return f, nil
}

// Done is closed when every piece is verified, or the fetch has failed.
func (f *Fetch) Done() <-chan struct{} { return f.done }

// Err is why the fetch failed; nil while it goes on and after it succeeded.
func (f *Fetch) Err() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.err
}

// Stats counts what came so far.
func (f *Fetch) Stats() Stats {
	return Stats{BytesFromPeers: f.fromPeers.Load(), BytesFromOrigins: f.fromOrigins.Load(), PiecesWasted: f.wasted.Load()}
}

// AddPeers offers peers, again and again as they are heard of.
func (f *Fetch) AddPeers(peers []Peer) {
	f.mu.Lock()
	for _, p := range peers {
		if p.ID != f.s.id && len(f.peers) < 10_000 {
			f.peers[p] = true
		}
	}
	f.mu.Unlock()
	f.feed()
}

// feed offers all known peers that are not connected.
func (f *Fetch) feed() {
	f.mu.Lock()
	known := make([]Peer, 0, len(f.peers))
	for p := range f.peers {
		known = append(known, p)
	}
	f.mu.Unlock()
	connected := map[[20]byte]bool{}
	for _, pc := range f.l.t.PeerConns() {
		connected[pc.PeerID] = true
	}
	var infos []torrent.PeerInfo
	for _, p := range known {
		if connected[p.ID] || f.s.net.banned(p.ID) {
			continue
		}
		a := f.s.net.know(p.Addr)
		infos = append(infos, torrent.PeerInfo{Id: p.ID, Addr: net.TCPAddrFromAddrPort(a), Source: torrent.PeerSourceTracker})
	}
	if len(infos) > 0 {
		f.l.t.AddPeers(infos)
	}
}

// tend feeds peers and enforces bans until the fetch is over.
func (f *Fetch) tend() {
	t := time.NewTicker(feedEvery)
	defer t.Stop()
	for {
		select {
		case <-f.ctx.Done():
			f.finish(context.Cause(f.ctx))
			return
		case <-f.done:
			return
		case <-f.l.t.Closed():
			f.finish(errClosed)
			return
		case <-t.C:
			f.feed()
			f.s.enforceBans()
		}
	}
}

// enforceBans reads the library's bans back: they hit a stand-in address, and must hit the peer.
func (s *Swarm) enforceBans() {
	s.report(s.net.ban(s.client.BadPeerIPs()))
}

func (s *Swarm) report(fresh []Ban) {
	for _, b := range fresh {
		s.m.bans.Inc()
		s.log.Warn("peer sent wrong bytes and is banned", "peer", b.ID, "addr", b.Addr, "until", b.Until)
	}
}

// verified is told of each piece that is there now.
func (f *Fetch) verified(i int, fromPeer bool) {
	f.progress.Store(nowNanos())
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.have.Has(i) {
		return
	}
	f.have.Set(i)
	for id := range f.from[i] {
		if fromPeer {
			f.s.net.trust(id)
		}
	}
	delete(f.from, i)
	if fromPeer {
		f.s.m.fromPeers.Inc()
		f.fromPeers.Add(f.m.PieceSize(i))
	} else {
		f.s.m.fromSources.Inc()
		f.fromOrigins.Add(f.m.PieceSize(i))
	}
	if f.left--; f.left == 0 {
		f.finishLocked(nil)
	}
}

// failed is told of each piece of the library's that failed its hash. The library bans a peer that sent the whole piece; here the
// only stranger among several senders is banned as well.
func (f *Fetch) failed(i int) {
	f.wasted.Add(1)
	f.s.m.wasted.Inc()
	f.mu.Lock()
	var strangers [][20]byte
	for id := range f.from[i] {
		if !f.s.net.trusted(id) {
			strangers = append(strangers, id)
		}
	}
	delete(f.from, i)
	f.mu.Unlock()
	if len(strangers) == 1 {
		f.s.report(f.s.net.banID(strangers[0]))
	}
	f.s.enforceBans()
}

func (f *Fetch) finish(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.finishLocked(err)
}

func (f *Fetch) finishLocked(err error) {
	if !f.ended {
		f.ended, f.err = true, err
		close(f.done)
	}
}

// SetWindow says that a reader will read length bytes from off on, in order. Other pieces come rarest first.
func (f *Fetch) SetWindow(reader, off, length int64) {
	l := f.m.PieceLength()
	w := window{int(off / l), int(min((off+length+l-1)/l, int64(f.m.NumPieces())))}
	f.mu.Lock()
	if f.windows[reader] == w {
		f.mu.Unlock()
		return
	}
	f.windows[reader] = w
	changes := f.reprioritize()
	f.mu.Unlock()
	f.apply(changes)
}

// DropWindow says that a reader has gone.
func (f *Fetch) DropWindow(reader int64) {
	f.mu.Lock()
	delete(f.windows, reader)
	changes := f.reprioritize()
	f.mu.Unlock()
	f.apply(changes)
}

type change struct {
	piece int
	prio  types.PiecePriority
}

// reprioritize computes which pieces' priority has to change; f.mu is held. Leased pieces are none of the library's.
func (f *Fetch) reprioritize() (out []change) {
	want := make([]types.PiecePriority, len(f.prio))
	for i := range want {
		if !f.leased[i] {
			want[i] = types.PiecePriorityNormal
		}
	}
	for _, w := range f.windows {
		n := 0
		for i := w.first; i < w.end; i++ {
			if f.have.Has(i) || f.leased[i] {
				continue
			}
			p := types.PiecePriorityHigh
			if n < urgent {
				p = types.PiecePriorityNow
			}
			n++
			want[i] = max(want[i], p)
		}
	}
	for i, p := range want {
		if p != f.prio[i] && !f.have.Has(i) {
			f.prio[i] = p
			out = append(out, change{i, p})
		}
	}
	return out
}

// apply tells the library, whose lock must not be taken under f.mu: it calls back under its own.
func (f *Fetch) apply(changes []change) {
	for _, c := range changes {
		f.l.t.Piece(c.piece).SetPriority(c.prio)
	}
}

// lease takes pieces from a source until the fetch is over.
func (f *Fetch) lease(src Source) {
	wait := time.Duration(0)
	t := time.NewTimer(0)
	defer t.Stop()
	failures := 0
	for {
		t.Reset(wait)
		select {
		case <-f.ctx.Done():
			return
		case <-f.done:
			return
		case <-t.C:
		}
		n, retry, err := f.leaseOnce(src)
		switch {
		case err != nil:
			failures++
			wait = min(100*time.Millisecond<<min(failures, 6), 5*time.Second)
			f.s.log.Debug("lease failed", "source", src.Name(), "digest", f.m.Digest, "error", err)
		case n > 0:
			failures, wait = 0, 0
		default:
			failures = 0
			wait = min(max(retry, 50*time.Millisecond), 2*time.Second)
		}
	}
}

// leaseOnce asks for pieces and fetches them, neighbours in one range.
func (f *Fetch) leaseOnce(src Source) (n int, retry time.Duration, err error) {
	r := LeaseRequest{Max: int(max(1, min(leaseBytes/f.m.PieceLength(), 64)))}
	f.mu.Lock()
	r.Have = f.have.Clone()
	for i := range f.leased {
		r.Have.Set(i) // on its way from another source
	}
	r.Want = f.wanted(r.Max)
	alone := len(f.peers) == 0 || time.Since(f.began) > stalled
	f.mu.Unlock()
	if r.Have.Full() {
		return 0, stalled / 4, nil
	}
	idle := time.Since(time.Unix(0, f.progress.Load()))
	r.Again = idle > stalled || (alone && f.l.t.Stats().ActivePeers == 0)
	if r.Again && idle > stalled {
		f.s.m.rescues.Inc()
	}
	ps, retry, err := src.Lease(f.ctx, f.m, r)
	if err != nil {
		return 0, 0, err
	}
	ps = f.take(ps)
	slices.Sort(ps)
	for len(ps) > 0 {
		k := 1
		for k < len(ps) && ps[k] == ps[k-1]+1 {
			k++
		}
		got, rerr := f.readRun(src, ps[0], k)
		n += got
		f.release(ps[:k])
		if rerr != nil {
			f.release(ps)
			return n, 0, rerr
		}
		ps = ps[k:]
	}
	return n, retry, nil
}

// wanted are the pieces that readers wait for; f.mu is held.
func (f *Fetch) wanted(n int) (out []int) {
	for _, w := range f.windows {
		for i := w.first; i < w.end && len(out) < n; i++ {
			if !f.have.Has(i) && !f.leased[i] {
				out = append(out, i)
			}
		}
	}
	return out
}

// take claims leased pieces for this source.
func (f *Fetch) take(ps []int) (mine []int) {
	f.mu.Lock()
	for _, i := range ps {
		if i >= 0 && i < f.m.NumPieces() && !f.have.Has(i) && !f.leased[i] {
			f.leased[i] = true
			mine = append(mine, i)
		}
	}
	changes := f.reprioritize()
	f.mu.Unlock()
	f.apply(changes)
	return mine
}

// release gives pieces back; those that did not come are the library's to fetch.
func (f *Fetch) release(ps []int) {
	f.mu.Lock()
	for _, i := range ps {
		delete(f.leased, i)
	}
	changes := f.reprioritize()
	f.mu.Unlock()
	f.apply(changes)
}

var errWrongPiece = errors.New("piece does not match its hash")

// readRun fetches k adjacent pieces in one range and checks each.
func (f *Fetch) readRun(src Source, first, k int) (n int, err error) {
	l := f.m.PieceLength()
	from := int64(first) * l
	to := min(from+int64(k)*l, f.m.Size)
	rc, err := src.ReadRange(f.ctx, f.m, from, to-from)
	if err != nil {
		return 0, err
	}
	defer rc.Close()
	buf := readBuffers.Get().(*[]byte)
	defer readBuffers.Put(buf)
	h := sha1.New()
	for i := first; i < first+k; i++ {
		h.Reset()
		at, end := int64(i)*l, int64(i)*l+f.m.PieceSize(i)
		for at < end {
			b := (*buf)[:min(int64(len(*buf)), end-at)]
			if _, err := io.ReadFull(rc, b); err != nil {
				return n, fmt.Errorf("read piece %d of %s from %s: %w", i, f.m.Digest, src.Name(), err)
			}
			f.progress.Store(nowNanos())
			h.Write(b)
			if !f.part.Has(i) {
				if _, err := f.part.WriteAt(b, at); err != nil {
					return n, fmt.Errorf("write piece %d of %s: %w", i, f.m.Digest, err)
				}
			}
			at += int64(len(b))
		}
		if [sha1.Size]byte(h.Sum(nil)) != f.m.PieceHash(i) {
			f.wasted.Add(1)
			f.s.m.wasted.Inc()
			return n, fmt.Errorf("piece %d of %s from %s: %w", i, f.m.Digest, src.Name(), errWrongPiece)
		}
		if err := f.part.MarkVerified(i); err != nil {
			return n, err
		}
		n++
		f.verified(i, false)
		f.l.t.Piece(i).UpdateCompletion() // sends Have, without hashing again
	}
	return n, nil
}

var readBuffers = sync.Pool{New: func() any { b := make([]byte, 256<<10); return &b }}

// Close ends the fetch. A blob that is whole in the store goes on being seeded.
func (f *Fetch) Close() {
	f.cancel()
	f.finish(context.Canceled)
	f.wg.Wait()
	ih := f.m.InfoHash()
	f.s.fetches.CompareAndDelete(ih, f)
	r, err := f.s.cfg.Store.Open(f.m.Digest)
	f.s.mu.Lock()
	current := f.s.loaded[ih] == f.l
	if current && err == nil {
		f.l.storage.become(r)
		f.l.fetch, f.l.used = nil, time.Now()
		f.s.mu.Unlock()
		return
	}
	if current {
		delete(f.s.loaded, ih)
	}
	f.s.mu.Unlock()
	if err == nil {
		r.Close()
	}
	f.l.drop()
}
func nowNanos() int64 { return time.Now().UnixNano() }
