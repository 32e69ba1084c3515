package swarm

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"kraken/origin/swarm/plan"
	"kraken/proto/blob"
)

// leaseServer is an origin: it leases each piece once, the ones that readers wait for first, and then the ones sent
// least.
type leaseServer struct {
	b []byte

	mu      sync.Mutex
	leased  []int // how often
	last    []time.Time
	again   time.Duration // how long a piece is not leased again
	order   []int         // in which pieces were leased first
	sent    int64
	ranges  int
	refuse  bool  // no leases any more
	answer  error // the answer to every request for a lease, if later is set; nil: "later"
	later   bool
	corrupt map[int64]bool // offsets of ranges that are answered wrong
	hang    bool           // bodies never come
	asked   func(m *blob.Metainfo, r LeaseRequest)
}

func newLeaseServer(b []byte) *leaseServer { return &leaseServer{b: b} }

func (l *leaseServer) Name() string { return "origin" }

func (l *leaseServer) Lease(_ context.Context, m *blob.Metainfo, r LeaseRequest) ([]int, time.Duration, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.asked != nil {
		l.asked(m, r)
	}
	if l.refuse {
		return nil, 0, errors.New("no leases today")
	}
	if l.later {
		return nil, 10 * time.Millisecond, l.answer
	}
	if l.leased == nil {
		l.leased, l.last = make([]int, m.NumPieces()), make([]time.Time, m.NumPieces())
	}
	var out []int
	taken := map[int]bool{}
	give := func(i, times int) {
		if len(out) < r.Max && !r.Have.Has(i) && !taken[i] && l.leased[i] == times && time.Since(l.last[i]) >= l.again {
			l.last[i] = time.Now()
			if l.leased[i]++; times == 0 {
				l.order = append(l.order, i)
			}
			taken[i] = true
			out = append(out, i)
		}
	}
	for _, i := range r.Want {
		if i < len(l.leased) {
			give(i, l.leased[i])
		}
	}
	for times := range 8 {
		for i := range l.leased {
			give(i, times)
		}
		if len(out) > 0 {
			break
		}
	}
	return out, 20 * time.Millisecond, nil
}

func (l *leaseServer) ReadRange(ctx context.Context, _ *blob.Metainfo, off, n int64) (io.ReadCloser, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ranges++
	if l.hang {
		r, w := io.Pipe()
		context.AfterFunc(ctx, func() { w.CloseWithError(ctx.Err()) })
		return r, nil
	}
	l.sent += n
	b := l.b[off : off+n]
	if l.corrupt[off] {
		delete(l.corrupt, off)
		b = bytes.Clone(b)
		b[0] ^= 1
	}
	return io.NopCloser(bytes.NewReader(b)), nil
}

func (l *leaseServer) bytesSent() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.sent
}

func TestSeedToLeecher(t *testing.T) {
	b := randomBytes(1, 16<<20+12345)
	seed, leech := newNode(t, nil), newNode(t, nil)
	m := seed.seed(b)
	st := leech.fetch(m, nil, seed.peer()).finish()
	leech.has(b)
	if st.BytesFromPeers != m.Size || st.PiecesVerified != m.NumPieces() || st.PiecesWasted != 0 {
		t.Errorf("stats %+v, want all %d bytes from peers", st, m.Size)
	}
	// The leecher seeds what it has fetched.
	third := newNode(t, nil)
	third.fetch(m, nil, leech.peer()).finish()
	third.has(b)
}

func TestBlobOfOneSmallPieceAndEmptyBlob(t *testing.T) {
	for _, size := range []int{0, 1, blob.MinPieceLength, blob.MinPieceLength + 1} {
		b := randomBytes(2, size)
		seed, leech := newNode(t, nil), newNode(t, nil)
		m := seed.seed(b)
		leech.fetch(m, nil, seed.peer()).finish()
		if size > 0 {
			leech.has(b)
		}
	}
}

func TestPiecesOfSeveralBlocks(t *testing.T) {
	if testing.Short() {
		t.Skip("moves 240 MiB")
	}
	b := randomBytes(3, 240<<20)
	seed, leech := newNode(t, nil), newNode(t, nil)
	m := seed.seed(b)
	if m.PieceLength() <= plan.MaxBlock {
		t.Fatalf("pieces of %d bytes are one block", m.PieceLength())
	}
	leech.fetch(m, nil, seed.peer()).finish()
	leech.has(b)
}

func TestOnlyLeases(t *testing.T) {
	b := randomBytes(4, 20<<20+1)
	m := metainfoOf(t, b)
	origin := newLeaseServer(b)
	n := newNode(t, nil)
	st := n.fetch(m, []Source{origin}).finish()
	n.has(b)
	if st.BytesFromOrigins != m.Size || origin.bytesSent() != m.Size {
		t.Errorf("stats %+v and %d bytes sent, want %d bytes once", st, origin.bytesSent(), m.Size)
	}
	if origin.ranges > m.NumPieces()/4 {
		t.Errorf("%d ranged reads for %d pieces: neighbours should be read with one", origin.ranges, m.NumPieces())
	}
}

func TestOneOriginFourLeechers(t *testing.T) {
	b := randomBytes(5, 8<<20)
	m := metainfoOf(t, b)
	origin := newLeaseServer(b)
	origin.again = time.Second
	var nodes []*node
	var peers []Peer
	for range 4 {
		// On a busy machine a block may take seconds, and what is overdue is leased.
		n := newNode(t, func(c *Config) { c.StallTimeout = 20 * time.Second })
		nodes, peers = append(nodes, n), append(peers, n.peer())
	}
	var downloads []*download
	for _, n := range nodes {
		downloads = append(downloads, n.fetch(m, []Source{origin}, peers...))
	}
	var traded int64
	for _, d := range downloads {
		st := d.finish()
		traded += st.BytesFromPeers
		t.Logf("%+v", st)
	}
	for _, n := range nodes {
		n.has(b)
	}
	copies := float64(origin.bytesSent()) / float64(m.Size)
	t.Logf("the origin sent %.2f copies, %.2f were traded", copies, float64(traded)/float64(m.Size))
	if copies >= 3 || traded < m.Size {
		t.Errorf("the origin sent %.2f copies and %.2f were traded, want less than 3 and more than 1", copies, float64(traded)/float64(m.Size))
	}
}

func TestResumeFetchesOnlyTheRest(t *testing.T) {
	b := randomBytes(6, 8<<20)
	m := metainfoOf(t, b)
	n := newNode(t, nil)
	p, err := n.store.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	var missing int64
	for i := range m.NumPieces() {
		if i%2 == 0 {
			missing += m.PieceSize(i)
			continue
		}
		off := int64(i) * m.PieceLength()
		if _, err := p.WriteAt(b[off:off+m.PieceSize(i)], off); err != nil {
			t.Fatal(err)
		}
		if err := p.MarkVerified(i); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	seed := newNode(t, nil)
	seed.seed(b)
	d := n.fetch(m, nil, seed.peer())
	st := d.finish()
	n.has(b)
	if st.BytesFromPeers != missing {
		t.Errorf("%d bytes were fetched, %d were missing", st.BytesFromPeers, missing)
	}
}

func TestDeadLeasesAreRescued(t *testing.T) {
	b := randomBytes(7, 4<<20)
	m := metainfoOf(t, b)
	origin := newLeaseServer(b)
	origin.refuse = true
	n := newNode(t, func(c *Config) { c.StallTimeout = 200 * time.Millisecond })
	st := n.fetch(m, []Source{origin}).finish()
	n.has(b)
	if st.BytesFromOrigins != m.Size {
		t.Errorf("stats %+v, want all from the origin", st)
	}
}

// An origin that answers "later" is not stalled, however long nothing comes: in a crowd the first pieces take long to
// reach all, and reads without leases would keep the origin from sending them.
func TestOriginThatSaysLaterIsNotStalled(t *testing.T) {
	b := randomBytes(20, 4<<20)
	m := metainfoOf(t, b)
	origin := newLeaseServer(b)
	origin.later = true
	asked, stalled := make(chan struct{}, 1000), make(chan struct{}, 1000)
	origin.asked = func(_ *blob.Metainfo, r LeaseRequest) {
		asked <- struct{}{}
		if r.Stalled {
			stalled <- struct{}{}
		}
	}
	n := newNode(t, func(c *Config) { c.StallTimeout = 50 * time.Millisecond })
	d := n.fetch(m, []Source{origin})
	for range 20 {
		<-asked
	}
	if origin.bytesSent() > 0 {
		t.Errorf("%d bytes were read without a lease from an origin that said to ask later", origin.bytesSent())
	}
	<-stalled // the origin is told, and may lease what it has sent lately
	origin.mu.Lock()
	origin.later, origin.asked = false, nil
	origin.mu.Unlock()
	d.finish()
	n.has(b)
}

// An origin that holds leases back is read from without them after a few answers.
func TestOriginThatHoldsLeasesBack(t *testing.T) {
	b := randomBytes(21, 2<<20)
	m := metainfoOf(t, b)
	origin := newLeaseServer(b)
	origin.later, origin.answer = true, ErrHeldBack
	var asked atomic.Int32
	origin.asked = func(*blob.Metainfo, LeaseRequest) { asked.Add(1) }
	n := newNode(t, func(c *Config) { c.StallTimeout = time.Minute })
	n.fetch(m, []Source{origin}).finish()
	n.has(b)
	if asked.Load() < 4 {
		t.Errorf("read without a lease after %d answers, want 4", asked.Load())
	}
}

// A read that gets little is cut off after the stall timeout, unless others fill the link: then a little is its share.
func TestWatch(t *testing.T) {
	const stall = 2 * time.Second
	for name, tc := range map[string]struct {
		rate    int64 // of the whole fetch, bytes a second
		trickle bool
		want    time.Duration
	}{
		"silent":                      {0, false, stall},
		"silent beside busy peers":    {1 << 20, false, stall},
		"slow, nothing else comes":    {0, true, stall},
		"slow, beside busy peers":     {1 << 20, true, (maxLetOff + 1) * stall},
		"slow, beside little traffic": {minProgress / 4, true, stall},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &Fetch{s: &Swarm{cfg: Config{StallTimeout: stall}}}
				f.rateOfAll.Store(tc.rate)
				cut := make(chan struct{})
				began := time.Now()
				w := f.watch(func() { close(cut) })
				from := w.count(bytes.NewReader(make([]byte, 1<<20)))
				for b := make([]byte, 1); ; {
					if tc.trickle {
						if _, err := from.Read(b); err != nil {
							t.Fatal(err)
						}
					}
					select {
					case <-cut:
						if took := time.Since(began); took != tc.want {
							t.Errorf("cut off after %s, want %s", took, tc.want)
						}
						return
					case <-time.After(stall/3 + time.Millisecond):
					}
				}
			})
		})
	}
}

func TestSecondSourceTakesOverFromAHangingOne(t *testing.T) {
	b := randomBytes(8, 8<<20)
	m := metainfoOf(t, b)
	bad, good := newLeaseServer(b), newLeaseServer(b)
	bad.hang = true
	n := newNode(t, func(c *Config) { c.StallTimeout = 200 * time.Millisecond })
	n.fetch(m, []Source{bad, good}).finish()
	n.has(b)
	if good.bytesSent() != m.Size {
		t.Errorf("the good origin sent %d bytes, want %d", good.bytesSent(), m.Size)
	}
}

func TestWrongBytesOfASourceAreFetchedAgain(t *testing.T) {
	b := randomBytes(9, 4<<20)
	m := metainfoOf(t, b)
	origin := newLeaseServer(b)
	origin.corrupt = map[int64]bool{0: true}
	n := newNode(t, func(c *Config) { c.StallTimeout = 200 * time.Millisecond })
	st := n.fetch(m, []Source{origin}).finish()
	n.has(b)
	if st.PiecesWasted != 1 {
		t.Errorf("%d pieces wasted, want 1", st.PiecesWasted)
	}
}

func TestNobodyDelivers(t *testing.T) {
	b := randomBytes(10, 1<<20)
	n := newNode(t, func(c *Config) { c.GiveUp = 300 * time.Millisecond })
	d := n.fetch(metainfoOf(t, b), nil)
	<-d.Done()
	if !errors.Is(d.Err(), ErrNoProgress) {
		t.Errorf("error %v, want %v", d.Err(), ErrNoProgress)
	}
	d.Close()
	d.part.Close()
}

func TestOneFetchAtATime(t *testing.T) {
	b := randomBytes(11, 1<<20)
	m := metainfoOf(t, b)
	n := newNode(t, nil)
	d := n.fetch(m, nil)
	if _, err := n.Fetch(context.Background(), Request{Partial: d.part}); !errors.Is(err, ErrBusy) {
		t.Errorf("second fetch: %v, want %v", err, ErrBusy)
	}
	d.Close()
	if !errors.Is(d.Err(), ErrClosed) {
		t.Errorf("closed fetch: %v, want %v", d.Err(), ErrClosed)
	}
	// Another one may follow.
	f, err := n.Fetch(context.Background(), Request{Partial: d.part, Sources: []Source{newLeaseServer(b)}})
	if err != nil {
		t.Fatal(err)
	}
	<-f.Done()
	if f.Err() != nil {
		t.Error(f.Err())
	}
	f.Close()
	d.part.Close()
}

func TestContextEndsTheFetch(t *testing.T) {
	n := newNode(t, nil)
	p, err := n.store.Partial(metainfoOf(t, randomBytes(12, 1<<20)))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	gone := errors.New("nobody reads")
	ctx, cancel := context.WithCancelCause(context.Background())
	f, err := n.Fetch(ctx, Request{Partial: p})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	cancel(gone)
	<-f.Done()
	if !errors.Is(f.Err(), gone) {
		t.Errorf("error %v, want the cause", f.Err())
	}
}

func TestWindowComesFirst(t *testing.T) {
	b := randomBytes(13, 16<<20)
	m := metainfoOf(t, b)
	first, length := int64(10<<20), int64(1<<20)
	from, to := int(first/m.PieceLength()), int((first+length)/m.PieceLength())

	t.Run("from an origin", func(t *testing.T) {
		origin := newLeaseServer(b)
		n := newNode(t, nil)
		d := n.fetch(m, nil)
		d.SetWindow(1, first, length)
		d.AddSource(origin)
		d.finish()
		for _, i := range origin.order[:to-from] {
			if i < from || i >= to {
				t.Errorf("piece %d was leased before the window %d..%d: %v", i, from, to, origin.order[:to-from+4])
				break
			}
		}
	})
	t.Run("from a peer", func(t *testing.T) {
		seed := newNode(t, nil)
		seed.seed(b)
		n := newNode(t, nil)
		d := n.fetch(m, nil)
		d.SetWindow(1, first, length)
		var order []int
		var mu sync.Mutex
		var wg sync.WaitGroup
		for i := range m.NumPieces() {
			wg.Go(func() {
				if d.part.Wait(t.Context(), i) == nil {
					mu.Lock()
					order = append(order, i)
					mu.Unlock()
				}
			})
		}
		d.AddPeers([]Peer{seed.peer()})
		d.finish()
		wg.Wait()
		// Waiting goroutines are scheduled in any order: the window is there within the first pieces, not exactly in
		// front.
		seen := 0
		for _, i := range order[:min(len(order), (to-from)*3)] {
			if i >= from && i < to {
				seen++
			}
		}
		if seen < to-from {
			t.Errorf("only %d of the %d pieces of the window are among the first %d: %v", seen, to-from, (to-from)*3, order)
		}
	})
}

func TestPeersAreDialledAgain(t *testing.T) {
	b := randomBytes(14, 2<<20)
	m := metainfoOf(t, b)
	// The address is known before anybody listens there.
	seed := newNode(t, nil)
	addr := seed.Addr()
	seed.Close()
	n := newNode(t, nil)
	d := n.fetch(m, nil, Peer{Addr: addr})
	eventually(t, "the first dial fails", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.peers[addr].tries > 0
	})
	late := newNode(t, func(c *Config) { c.Listen = addr.String() })
	late.seed(b)
	d.finish()
	n.has(b)
}

func TestOneConnectionAPair(t *testing.T) {
	b := randomBytes(15, 4<<20)
	m := metainfoOf(t, b)
	a, c := newNode(t, nil), newNode(t, nil)
	da, dc := a.fetch(m, nil, c.peer()), c.fetch(m, nil, a.peer())
	one := func(n *node) bool {
		return len(n.find(m.InfoHash()).connsOf(a.PeerID()))+len(n.find(m.InfoHash()).connsOf(c.PeerID())) == 1
	}
	eventually(t, "one connection on both sides", func() bool { return one(a) && one(c) })
	src := newLeaseServer(b)
	da.AddSource(src)
	da.finish()
	dc.finish()
	c.has(b)
}
