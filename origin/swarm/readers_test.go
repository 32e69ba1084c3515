package swarm

import (
	"context"
	"io"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/anacrolix/torrent"
	"golang.org/x/time/rate"

	"kraken/proto/blob"
	"kraken/proto/config"
)

// arrivals notes in which order pieces come.
type arrivals struct {
	mu    sync.Mutex
	order []int
	more  chan struct{} // closed and replaced when one has come
}

// watch begins to note.
func (d *download) watch(t *testing.T) *arrivals {
	a := &arrivals{more: make(chan struct{})}
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() {
		cancel()
		wg.Wait()
	})
	for i := range d.m.NumPieces() {
		if d.part.Has(i) {
			continue
		}
		wg.Go(func() {
			if d.part.Wait(ctx, i) != nil {
				return
			}
			a.mu.Lock()
			defer a.mu.Unlock()
			a.order = append(a.order, i)
			close(a.more)
			a.more = make(chan struct{})
		})
	}
	return a
}

// until waits for a condition on what has come.
func (a *arrivals) until(t *testing.T, what string, ok func(order []int) bool) []int {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		a.mu.Lock()
		order, more := slices.Clone(a.order), a.more
		a.mu.Unlock()
		if ok(order) {
			return order
		}
		select {
		case <-more:
		case <-deadline:
			t.Fatalf("waited in vain: %s; %v came", what, order)
		}
	}
}

func in(order []int, from, to int) (n int) {
	for _, i := range order {
		if i >= from && i < to {
			n++
		}
	}
	return n
}

// TestAbandonedWindow: a reader leaves, and another one's window comes before what the first would have read.
func TestAbandonedWindow(t *testing.T) {
	const rate = 6 << 20
	b := randomBytes(20, 24<<20)
	m := metainfoOf(t, b)
	piece := func(off int) int { return off / int(m.PieceLength()) }
	// Both windows end where another begins; the one that is left comes first in the file.
	left, leftLen, next, nextLen := 8<<20, 8<<20, 16<<20, 2<<20
	leave := func(t *testing.T, d *download, a *arrivals) {
		a.until(t, "a piece of the first window", func(order []int) bool { return in(order, piece(left), piece(left+leftLen)) > 0 })
		d.DropWindow(1)
		d.SetWindow(2, int64(next), int64(nextLen))
	}
	done := func(order []int) bool { return in(order, piece(next), piece(next+nextLen)) == piece(nextLen) }

	t.Run("from an origin", func(t *testing.T) {
		origin := newLeaseServer(b)
		n := newNode(t, nil)
		d := n.fetch(m, nil)
		a := d.watch(t)
		d.SetWindow(1, int64(left), int64(leftLen))
		d.AddSource(slowSource{origin, limit(rate)})
		leave(t, d, a)
		before := origin.leases()
		a.until(t, "the second window", done)
		order := origin.leases()
		// Leases that were asked for before are read to their end.
		const underWay = 16
		if n := in(order[len(before):], piece(left), piece(left+leftLen)); n > underWay {
			t.Errorf("%d pieces were leased for a reader that has gone before the window of one that reads, want at most %d", n, underWay)
		}
		a.until(t, "some of the rest", func([]int) bool { return in(origin.leases(), 0, piece(4<<20)) == piece(4<<20) })
		order = origin.leases()
		if n := in(order[len(before):], piece(left), piece(left+leftLen)); n > underWay {
			t.Errorf("%d pieces were leased for a reader that has gone before the ones that are in order, want at most %d", n, underWay)
		}
		d.abandon()
	})
	t.Run("from a peer", func(t *testing.T) {
		seed := newNode(t, func(c *Config) { c.UploadRate = config.Rate(rate) })
		seed.seed(b)
		n := newNode(t, nil)
		d := n.fetch(m, nil)
		a := d.watch(t)
		d.SetWindow(1, int64(left), int64(leftLen))
		d.AddPeers([]Peer{seed.peer()})
		leave(t, d, a)
		for i := piece(left); i < piece(left+leftLen); i++ {
			d.t.use(func(lib *torrent.Torrent) {
				if p := lib.PieceState(i); !p.Complete && p.Priority > torrent.PiecePriorityNormal {
					t.Errorf("piece %d has priority %v, and nobody waits for it", i, p.Priority)
				}
			})
		}
		order := a.until(t, "the second window", done)
		// What the peer was asked for before comes still.
		if n := in(order, piece(left), piece(left+leftLen)); n > inFlight/int(m.PieceLength()) {
			t.Errorf("%d pieces came for a reader that has gone before the window of one that reads: %v", n, order)
		}
		d.abandon()
	})
}

// TestReadersAtSeveralOffsets: all get their first bytes soon, not in the order of the file.
func TestReadersAtSeveralOffsets(t *testing.T) {
	const readers, window = 6, 4 << 20
	b := randomBytes(21, readers*window)
	m := metainfoOf(t, b)
	per := window / int(m.PieceLength())
	fronts := func(order []int) bool {
		for r := range readers {
			if in(order, r*per, r*per+1) == 0 {
				return false
			}
		}
		return true
	}
	t.Run("from an origin", func(t *testing.T) {
		origin := newLeaseServer(b)
		n := newNode(t, nil)
		d := n.fetch(m, nil)
		for r := range readers {
			d.SetWindow(int64(r), int64(r*window), window)
		}
		a := d.watch(t)
		d.AddSource(origin)
		a.until(t, "everybody's first piece", fronts)
		if order := origin.leases(); !fronts(order[:readers]) {
			t.Errorf("pieces were leased in the order %v, and readers wait for every %dth first", order[:2*readers], per)
		}
		d.abandon()
	})
	t.Run("from a peer", func(t *testing.T) {
		const rate = 4 << 20
		seed := newNode(t, func(c *Config) { c.UploadRate = config.Rate(rate) })
		seed.seed(b)
		n := newNode(t, nil)
		d := n.fetch(m, nil)
		for r := range readers {
			d.SetWindow(int64(r), int64(r*window), window)
		}
		a := d.watch(t)
		d.AddPeers([]Peer{seed.peer()})
		order := a.until(t, "everybody's first piece", fronts)
		if len(order) > m.NumPieces()/4 {
			t.Errorf("%d of %d pieces came until every reader had its first: %v", len(order), m.NumPieces(), order)
		}
		d.abandon()
	})
}

// A hundred blobs share few connections, at either end, and all come.
func TestManyBlobsAtOnce(t *testing.T) {
	n := newNode(t, func(c *Config) { c.MaxConns = fewConns })
	manyBlobs(t, newNode(t, nil), n, n)
}

func TestManyBlobsOfABusySeed(t *testing.T) {
	seed := newNode(t, func(c *Config) { c.MaxConns = fewConns })
	manyBlobs(t, seed, newNode(t, nil), seed)
}

const fewConns = 50

func manyBlobs(t *testing.T, seed, n, busy *node) {
	const blobs, size = 100, 512 << 10
	var all []*blob.Metainfo
	for i := range blobs {
		all = append(all, seed.seed(randomBytes(uint64(200+i), size)))
	}
	most := 0
	var downloads []*download
	for _, m := range all {
		downloads = append(downloads, n.fetch(m, nil, seed.peer()))
	}
	for _, d := range downloads {
		eventually(t, "a blob is there", func() bool {
			busy.mu.Lock()
			most = max(most, len(busy.conns))
			busy.mu.Unlock()
			select {
			case <-d.Done():
				return true
			default:
				return false
			}
		})
		d.finish()
	}
	if most > fewConns {
		t.Errorf("%d connections at once, want at most %d", most, fewConns)
	}
}

// TestManyBlobsOverASlowLink: a hundred blobs from one origin take turns, so that none is given up because all are slow
// together.
func TestManyBlobsOverASlowLink(t *testing.T) {
	const blobs, size, rate = 100, 256 << 10, 5 << 20
	n := newNode(t, func(c *Config) { c.StallTimeout = 500 * time.Millisecond })
	link, guests := limit(rate), &guests{}
	var origins []*leaseServer
	var downloads []*download
	for i := range blobs {
		b := randomBytes(uint64(300+i), size)
		origin := newLeaseServer(b)
		origins = append(origins, origin)
		downloads = append(downloads, n.fetch(metainfoOf(t, b), []Source{visited{slowSource{origin, link}, guests}}))
	}
	for _, d := range downloads {
		d.finish()
	}
	var sent int64
	for _, o := range origins {
		sent += o.bytesSent()
	}
	if sent > blobs*size*11/10 {
		t.Errorf("%d bytes were asked for to get %d", sent, blobs*size)
	}
	guests.mu.Lock()
	defer guests.mu.Unlock()
	if guests.most > maxPerSource {
		t.Errorf("%d requests to the origin at once, want at most %d", guests.most, maxPerSource)
	}
}

// guests counts the requests to an origin.
type guests struct {
	mu        sync.Mutex
	now, most int
}

func (g *guests) come() (gone func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.now++
	g.most = max(g.most, g.now)
	return sync.OnceFunc(func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.now--
	})
}

// visited is a source whose guests are counted.
type visited struct {
	Source
	g *guests
}

func (v visited) Lease(ctx context.Context, m *blob.Metainfo, r LeaseRequest) ([]int, time.Duration, error) {
	defer v.g.come()()
	return v.Source.Lease(ctx, m, r)
}

func (v visited) ReadRange(ctx context.Context, m *blob.Metainfo, off, n int64) (io.ReadCloser, error) {
	gone := v.g.come()
	body, err := v.Source.ReadRange(ctx, m, off, n)
	if err != nil {
		gone()
		return nil, err
	}
	return visit{body, gone}, nil
}

type visit struct {
	io.ReadCloser
	gone func()
}

func (v visit) Close() error {
	defer v.gone()
	return v.ReadCloser.Close()
}

// limit allows a rate, in small bits.
func limit(bytesPerSecond int) *rate.Limiter {
	return rate.NewLimiter(rate.Limit(bytesPerSecond), 64<<10)
}

// leases are the pieces that were leased so far, in order.
func (l *leaseServer) leases() []int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.order)
}

// abandon ends a download that need not come to its end.
func (d *download) abandon() {
	d.n.t.Helper()
	if err := d.Close(); err != nil {
		d.n.t.Errorf("close fetch: %v", err)
	}
	if err := d.part.Close(); err != nil {
		d.n.t.Errorf("close partial blob: %v", err)
	}
}
