package swarm

import (
	"bytes"
	"context"
	"log/slog"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"kraken/origin/store"
	"kraken/proto/blob"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m,
		// The library ends these by themselves a moment after Close: dial attempts in flight.
		goleak.IgnoreAnyFunction("github.com/anacrolix/torrent.(*dialPool).drainAndCloseRemainingDials"),
	)
}

// testLog shows what happens when KRAKEN_TEST_LOG is set.
func testLog() *slog.Logger {
	if os.Getenv("KRAKEN_TEST_LOG") == "" {
		return nil
	}
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// node is a swarm with a store of its own.
type node struct {
	*Swarm
	t     testing.TB
	store *store.Store
}

func newNode(t testing.TB, change func(*Config)) *node {
	t.Helper()
	st, err := store.Open(store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Listen: "127.0.0.1:0", Store: st, Logger: testLog(), Registerer: prometheus.NewRegistry()}
	if change != nil {
		change(&cfg)
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Swarm: s, t: t, store: st}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Run(ctx); err != nil {
			t.Errorf("run: %v", err)
		}
	})
	t.Cleanup(func() {
		cancel()
		wg.Wait()
		if err := st.Close(); err != nil {
			t.Errorf("close store: %v", err)
		}
	})
	return n
}

func (n *node) peer() Peer { return Peer{ID: n.PeerID(), Addr: n.Addr()} }

// seed gives the node the whole blob.
func (n *node) seed(b []byte) *blob.Metainfo {
	n.t.Helper()
	ctx := context.Background()
	d := digest.FromBytes(b)
	if _, err := n.store.Ingest(ctx, d, int64(len(b)), bytes.NewReader(b), nil); err != nil {
		n.t.Fatal(err)
	}
	m, err := n.store.ComputeMetainfo(ctx, d)
	if err != nil {
		n.t.Fatal(err)
	}
	n.Register(m)
	return m
}

// download is a Fetch and its partial blob.
type download struct {
	*Fetch
	n    *node
	part *store.Partial
}

func (n *node) fetch(m *blob.Metainfo, sources []Source, peers ...Peer) *download {
	n.t.Helper()
	p, err := n.store.Partial(m)
	if err != nil {
		n.t.Fatal(err)
	}
	f, err := n.Fetch(context.Background(), Request{Partial: p, Sources: sources, Peers: peers})
	if err != nil {
		n.t.Fatal(err)
	}
	return &download{f, n, p}
}

// finish waits for the download, commits it, and returns what the fetch counted.
func (d *download) finish() Stats {
	d.n.t.Helper()
	select {
	case <-d.Done():
	case <-time.After(time.Minute):
		d.n.t.Errorf("not complete after a minute: %d bytes left, %+v", d.Left(), d.Stats())
	}
	st := d.Stats()
	if err := d.Err(); err != nil {
		d.n.t.Errorf("fetch: %v", err)
	} else if _, err := d.part.Commit(context.Background()); err != nil {
		d.n.t.Errorf("commit: %v", err)
	}
	if err := d.Close(); err != nil {
		d.n.t.Errorf("close fetch: %v", err)
	}
	if err := d.part.Close(); err != nil {
		d.n.t.Errorf("close partial blob: %v", err)
	}
	return st
}

// has checks that the node's store holds exactly these bytes.
func (n *node) has(b []byte) {
	n.t.Helper()
	r, err := n.store.Open(digest.FromBytes(b))
	if err != nil {
		n.t.Fatal(err)
	}
	defer r.Close()
	got, err := os.ReadFile(r.File().Name())
	if err != nil {
		got = make([]byte, r.Info().Size)
		if _, err := r.File().ReadAt(got, 0); err != nil {
			n.t.Fatal(err)
		}
	}
	if !bytes.Equal(got, b) {
		n.t.Fatal("the store holds other bytes")
	}
}

// randomBytes are the same for one seed.
func randomBytes(seed uint64, n int) []byte {
	b := make([]byte, n)
	rnd := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8)})
	rnd.Read(b)
	return b
}

func metainfoOf(t testing.TB, b []byte) *blob.Metainfo {
	t.Helper()
	h := blob.NewPieceHasher(int64(len(b)))
	if _, err := h.Write(b); err != nil {
		t.Fatal(err)
	}
	m, err := h.Sum(digest.FromBytes(b))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// eventually waits for a condition.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
