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

// recorder is a Source that leases nothing, and says what it was asked with.
type recorder struct{ asked chan LeaseRequest }

func (recorder) Name() string { return "recorder" }

func (r recorder) Lease(ctx context.Context, _ *blob.Metainfo, q LeaseRequest) ([]int, time.Duration, error) {
	select {
	case r.asked <- q:
	case <-ctx.Done():
	}
	return nil, 0, nil
}

func (recorder) ReadRange(context.Context, *blob.Metainfo, int64, int64) (io.ReadCloser, error) {
	return nil, io.ErrUnexpectedEOF
}

// TestAbandonedWindow: a reader leaves, and neither a Source nor a peer is asked for what it would have read any more.
// In what order pieces come then is package plan's to show.
func TestAbandonedWindow(t *testing.T) {
	b := randomBytes(20, 8<<20)
	m := metainfoOf(t, b)
	n := newNode(t, nil)
	d := n.fetch(m, nil)
	source := recorder{make(chan LeaseRequest)}
	const left, next = 10, 40 // pieces
	d.SetWindow(1, left*m.PieceLength(), 4*m.PieceLength())
	d.AddSource(source)
	if q := <-source.asked; !slices.Contains(q.Want, left) {
		t.Errorf("a lease is asked for with %v, and a reader waits for %d", q.Want, left)
	}
	d.DropWindow(1)
	d.SetWindow(2, next*m.PieceLength(), 4*m.PieceLength())
	<-source.asked // it may have been under way
	if q := <-source.asked; !slices.Contains(q.Want, next) || slices.Contains(q.Want, left) {
		t.Errorf("a lease is asked for with %v, and a reader waits for %d", q.Want, next)
	}
	d.t.use(func(lib *torrent.Torrent) {
		if p := lib.PieceState(left).Priority; p != torrent.PiecePriorityNormal {
			t.Errorf("a piece that nobody waits for has priority %v", p)
		}
		if p := lib.PieceState(next).Priority; p != torrent.PiecePriorityNow {
			t.Errorf("the piece that a reader waits for has priority %v", p)
		}
	})
	d.abandon()
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
			most = max(most, len(busy.conns)-len(busy.unfinished.all))
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
