package swarm

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/store"
	"kraken/proto/blob"
)

// content is n bytes that don't compress, and what is known of them.
func content(t testing.TB, n int) ([]byte, *blob.Metainfo) {
	t.Helper()
	b := make([]byte, n)
	rnd := rand.NewChaCha8([32]byte{byte(n), byte(n >> 8), byte(n >> 16)})
	rnd.Read(b)
	h := blob.NewPieceHasher(int64(n))
	if _, err := h.Write(b); err != nil {
		t.Fatal(err)
	}
	m, err := h.Sum(digest.FromBytes(b))
	if err != nil {
		t.Fatal(err)
	}
	return b, m
}

type node struct {
	*Swarm
	store *store.Store
}

func newNode(t *testing.T, stock bool) *node {
	t.Helper()
	st, err := store.Open(store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	s, err := New(Config{Listen: "127.0.0.1:0", Store: st, StockPeers: stock, Registerer: prometheus.NewRegistry()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Log(err)
		}
		st.Close()
	})
	return &node{s, st}
}

// has makes the node hold the whole blob.
func (n *node) has(t *testing.T, b []byte, m *blob.Metainfo) {
	t.Helper()
	if _, err := n.store.Ingest(context.Background(), m.Digest, m.Size, bytes.NewReader(b), nil); err != nil {
		t.Fatal(err)
	}
	n.Register(m)
}

func (n *node) peer() Peer { return Peer{n.PeerID(), n.Addr()} }

// fetch downloads and commits; it returns what came from where.
func (n *node) fetch(t *testing.T, m *blob.Metainfo, sources []Source, peers ...Peer) Stats {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	p, err := n.store.Partial(m)
	if err != nil {
		t.Error(err)
		return Stats{}
	}
	defer p.Close()
	f, err := n.Fetch(ctx, Request{Partial: p, Sources: sources, Peers: peers})
	if err != nil {
		t.Error(err)
		return Stats{}
	}
	defer f.Close()
	<-f.Done()
	if err := f.Err(); err != nil {
		t.Errorf("fetch: %v after %d of %d pieces", err, p.Bitmap().Count(), m.NumPieces())
		return f.Stats()
	}
	if _, err := p.Commit(ctx); err != nil {
		t.Error(err)
	}
	n.Register(m)
	return f.Stats()
}

// origin is a small correct source: each piece once, again only when asked for.
type origin struct {
	b    []byte
	mu   sync.Mutex
	sent map[int]int
	n    int64 // bytes
	last int   // highest piece of the first lease
	log  []int
}

func newOrigin(b []byte) *origin { return &origin{b: b, sent: map[int]int{}} }

func (o *origin) Name() string { return "fake" }

func (o *origin) Lease(_ context.Context, m *blob.Metainfo, r LeaseRequest) ([]int, time.Duration, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out []int
	give := func(i, limit int) {
		if len(out) < r.Max && !r.Have.Has(i) && o.sent[i] < limit {
			o.sent[i]++
			o.log = append(o.log, i)
			out = append(out, i)
		}
	}
	for _, i := range r.Want {
		give(i, 1)
	}
	for i := range m.NumPieces() {
		give(i, 1)
	}
	if r.Again {
		for i := range m.NumPieces() {
			give(i, 1<<30)
		}
	}
	return out, 20 * time.Millisecond, nil
}

func (o *origin) ReadRange(_ context.Context, _ *blob.Metainfo, off, n int64) (io.ReadCloser, error) {
	o.mu.Lock()
	o.n += n
	o.mu.Unlock()
	return io.NopCloser(bytes.NewReader(o.b[off : off+n])), nil
}

func TestSeedToLeecher(t *testing.T) {
	b, m := content(t, 16<<20)
	seed, leecher := newNode(t, false), newNode(t, false)
	seed.has(t, b, m)
	if n := len(seed.loaded); n != 0 {
		t.Fatalf("%d torrents are loaded before anybody asked", n)
	}
	s := leecher.fetch(t, m, nil, seed.peer())
	if s.BytesFromPeers != m.Size || s.BytesFromOrigins != 0 {
		t.Errorf("stats %+v, want all %d bytes from peers", s, m.Size)
	}
}

func TestLeasesAloneAreEnough(t *testing.T) {
	b, m := content(t, 5<<20+1)
	o := newOrigin(b)
	s := newNode(t, false).fetch(t, m, []Source{o})
	if s.BytesFromOrigins != m.Size || o.n != m.Size {
		t.Errorf("stats %+v, the origin sent %d bytes, want %d once", s, o.n, m.Size)
	}
}

func TestFourAgentsShareOneOrigin(t *testing.T) {
	b, m := content(t, 48<<20)
	o := newOrigin(b)
	var nodes []*node
	var peers []Peer
	for range 4 {
		n := newNode(t, false)
		nodes, peers = append(nodes, n), append(peers, n.peer())
	}
	var wg sync.WaitGroup
	stats := make([]Stats, len(nodes))
	for i, n := range nodes {
		wg.Go(func() { stats[i] = n.fetch(t, m, []Source{o}, peers...) })
	}
	wg.Wait()
	var fromPeers int64
	for _, s := range stats {
		fromPeers += s.BytesFromPeers
	}
	if o.n >= 3*m.Size || fromPeers < m.Size {
		t.Errorf("the origin sent %.2f copies, peers %.2f", float64(o.n)/float64(m.Size), float64(fromPeers)/float64(m.Size))
	}
}

func TestResumeFetchesOnlyTheRest(t *testing.T) {
	b, m := content(t, 8<<20)
	n := newNode(t, false)
	p, err := n.store.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	var there int64
	for i := 0; i < m.NumPieces(); i += 2 {
		off := int64(i) * m.PieceLength()
		if _, err := p.WriteAt(b[off:off+m.PieceSize(i)], off); err != nil {
			t.Fatal(err)
		}
		if err := p.MarkVerified(i); err != nil {
			t.Fatal(err)
		}
		there += m.PieceSize(i)
	}
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	o := newOrigin(b)
	if s := n.fetch(t, m, []Source{o}); s.BytesFromOrigins != m.Size-there {
		t.Errorf("%d bytes were fetched, want %d", s.BytesFromOrigins, m.Size-there)
	}
}

// liar holds a blob whose every piece is wrong.
func newLiar(t *testing.T, b []byte, m *blob.Metainfo) *node {
	t.Helper()
	n := newNode(t, true)
	n.has(t, b, m)
	bad := bytes.Clone(b)
	for i := 0; i < len(bad); i += 1000 {
		bad[i] ^= 0xff
	}
	// Its store keeps the right bytes; what it seeds from is wrong.
	p, err := n.store.Partial(fake(t, bad, m))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.WriteAt(bad, 0); err != nil {
		t.Fatal(err)
	}
	l := &loaded{storage: &pieces{m: m, part: p}, used: time.Now()}
	for i := range m.NumPieces() {
		if err := p.MarkVerified(i); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { p.Close() })
	l.t = n.add(m, l.storage)
	n.mu.Lock()
	n.loaded[m.InfoHash()] = l
	n.mu.Unlock()
	return n
}

// fake is the metainfo of other bytes of the same size, so that a store keeps them.
func fake(t *testing.T, bad []byte, m *blob.Metainfo) *blob.Metainfo {
	t.Helper()
	h := blob.NewPieceHasher(m.Size)
	if _, err := h.Write(bad); err != nil {
		t.Fatal(err)
	}
	out, err := h.Sum(digest.FromBytes(bad))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func TestLiarAmongThreeSeeds(t *testing.T) {
	b, m := content(t, 24<<20)
	liar := newLiar(t, b, m)
	peers := []Peer{liar.peer()}
	for range 2 {
		n := newNode(t, false)
		n.has(t, b, m)
		peers = append(peers, n.peer())
	}
	victim := newNode(t, false)
	s := victim.fetch(t, m, nil, peers...)
	if s.PiecesWasted > 2 {
		t.Errorf("%d pieces were fetched again, want at most 2", s.PiecesWasted)
	}
	for _, ban := range victim.Bans() {
		if ban.ID != idString(liar.PeerID()) || ban.Addr != liar.Addr().String() {
			t.Errorf("an honest peer is banned: %+v", ban)
		}
	}
	if s.PiecesWasted > 0 && len(victim.Bans()) == 0 {
		t.Error("the liar is not banned")
	}
}

func TestLiarIsTheOnlyPeer(t *testing.T) {
	b, m := content(t, 8<<20)
	liar := newLiar(t, b, m)
	o := newOrigin(b)
	o.sent = map[int]int{}
	for i := range m.NumPieces() {
		o.sent[i] = 1 // the origin has nothing new to lease: the victim has to try its peer first
	}
	victim := newNode(t, false)
	s := victim.fetch(t, m, []Source{o}, liar.peer())
	if s.PiecesWasted > 2 || s.BytesFromPeers != 0 {
		t.Errorf("stats %+v, want at most 2 pieces wasted and none taken from the liar", s)
	}
	if bans := victim.Bans(); len(bans) != 1 || bans[0].ID != idString(liar.PeerID()) || bans[0].Addr != liar.Addr().String() {
		t.Errorf("bans %+v, want the liar %s at %s", bans, idString(liar.PeerID()), liar.Addr())
	}
}

func TestStandInsAreOnePerAddress(t *testing.T) {
	a, b := netip.MustParseAddrPort("127.0.0.1:1000"), netip.MustParseAddrPort("127.0.0.1:1001")
	if standIn(a).Addr() == standIn(b).Addr() || standIn(a) != standIn(a) || !standIn(a).Addr().IsPrivate() {
		t.Errorf("stand-ins %s and %s", standIn(a), standIn(b))
	}
}
