package swarm

import (
	"context"
	"crypto/sha1"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/blob"
)

func TestTorrentsExistOnlyWhileAskedFor(t *testing.T) {
	b := randomBytes(20, 4<<20)
	seed := newNode(t, func(c *Config) { c.IdleTimeout = 50 * time.Millisecond })
	m := seed.seed(b)
	if n := len(seed.client.Torrents()); n != 0 {
		t.Fatalf("%d torrents before anybody asked", n)
	}
	leech := newNode(t, nil)
	leech.fetch(m, nil, seed.peer()).finish()
	leech.has(b)
	if n := seed.BytesSent()[m.Digest]; n < m.Size {
		t.Errorf("%d bytes were sent, want %d at least", n, m.Size)
	}
	eventually(t, "idle torrent is dropped", func() bool { return len(seed.client.Torrents()) == 0 })
	if n := seed.BytesSent()[m.Digest]; n < m.Size {
		t.Errorf("%d bytes were sent when the torrent was dropped, want %d at least", n, m.Size)
	}
	if n := leech.BytesSent()[m.Digest]; n != 0 {
		t.Errorf("who was alone with a seed has sent %d bytes", n)
	}
	// And once more.
	again := newNode(t, nil)
	again.fetch(m, nil, seed.peer()).finish()
	again.has(b)
}

// TestAsked: a visit counts also when it was short and has ended, and not for ever.
func TestAsked(t *testing.T) {
	b := randomBytes(23, 2<<20)
	seed := newNode(t, func(c *Config) { c.IdleTimeout = time.Hour })
	m := seed.seed(b)
	if asked := seed.Asked(); len(asked) != 0 {
		t.Errorf("asked for %v before anybody did", asked)
	}
	leech := newNode(t, nil)
	leech.fetch(m, nil, seed.peer()).finish()
	leech.Close()
	lt := seed.find(m.InfoHash())
	eventually(t, "the visitor is gone", func() bool {
		lt.mu.Lock()
		defer lt.mu.Unlock()
		return len(lt.conns) == 0
	})
	if asked := seed.Asked(); !slices.Equal(asked, []digest.Digest{m.Digest}) {
		t.Errorf("after a visit asked for %v, want %v", asked, m.Digest)
	}
	lt.mu.Lock()
	lt.used = lt.used.Add(-time.Hour)
	lt.mu.Unlock()
	if asked := seed.Asked(); len(asked) != 0 {
		t.Errorf("an hour after the visit asked for %v", asked)
	}
}

func TestRunFindsWhatIsInTheStore(t *testing.T) {
	dir := t.TempDir()
	b := randomBytes(21, 2<<20)
	st, err := store.Open(store.Config{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	first := newNode(t, func(c *Config) { c.Store = st })
	first.store = st
	m := first.seed(b)
	first.Close()
	restarted := newNode(t, func(c *Config) { c.Store = st })
	leech := newNode(t, nil)
	leech.fetch(m, nil, restarted.peer()).finish()
	leech.has(b)
	t.Cleanup(func() { st.Close() })
}

// knownHashes are the hashes of a blob that arrives, of which all are known.
type knownHashes struct{ m *blob.Metainfo }

func (h knownHashes) Known() int { return h.m.NumPieces() }

func (h knownHashes) Received() int64 { return h.m.Size }

func (h knownHashes) PieceHash(_ context.Context, i int) ([sha1.Size]byte, error) {
	return h.m.PieceHash(i), nil
}

// A blob that came while it arrived elsewhere is forgotten under the info-hash that it came with, too, and what is
// counted of one that is not seeded is not kept.
func TestForgottenBlobThatArrived(t *testing.T) {
	b := randomBytes(23, 2<<20)
	n := newNode(t, nil)
	m := metainfoOf(t, b)
	provisional, err := blob.Provisional(m.Digest, m.Size, "")
	if err != nil {
		t.Fatal(err)
	}
	p, err := n.store.Partial(provisional)
	if err != nil {
		t.Fatal(err)
	}
	f, err := n.Fetch(t.Context(), Request{Partial: p, Hashes: knownHashes{m}, Sources: []Source{newLeaseServer(b)}})
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "it came", func() bool {
		select {
		case <-f.Done():
			return true
		default:
			return false
		}
	})
	if _, err := p.CommitAs(t.Context(), m); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if n.find(provisional.InfoHash()) == nil {
		t.Fatal("it is not seeded to those who still fetch it")
	}
	n.loadMu.Lock()
	n.sentBefore[m.Digest] = 7
	n.loadMu.Unlock()
	n.Forget(m.Digest)
	if n.find(provisional.InfoHash()) != nil {
		t.Error("the torrent is still loaded")
	}
	if sent := n.BytesSent(); len(sent) != 0 {
		t.Errorf("what was sent of it is still counted: %v", sent)
	}
}

// growing are hashes of which none is known until done is closed; meanwhile bytes come to who fetches the blob.
type growing struct {
	knownHashes
	done chan struct{}
	came atomic.Int64
}

func (h *growing) Known() int {
	select {
	case <-h.done:
		return h.knownHashes.Known()
	default:
		return 0
	}
}

func (h *growing) Received() int64 { return h.came.Add(1) }

func (h *growing) PieceHash(ctx context.Context, i int) (sum [sha1.Size]byte, err error) {
	select {
	case <-h.done:
		return h.m.PieceHash(i), nil
	case <-ctx.Done():
		return sum, context.Cause(ctx)
	}
}

// A fetch of which no piece comes is not given up while bytes come to the origin: a piece takes long on a slow link,
// and who takes a blob over begins at its first byte.
func TestNotGivenUpWhileBytesCome(t *testing.T) {
	b := randomBytes(24, 2<<20)
	m := metainfoOf(t, b)
	provisional, err := blob.Provisional(m.Digest, m.Size, "")
	if err != nil {
		t.Fatal(err)
	}
	for name, comes := range map[string]bool{"bytes come": true, "nothing comes": false} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, func(c *Config) { c.GiveUp = time.Second })
			p, err := n.store.Partial(provisional)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			h := &growing{knownHashes: knownHashes{m}, done: make(chan struct{})}
			var hashes Hashes = h
			if !comes {
				hashes = still{h}
			}
			f, err := n.Fetch(t.Context(), Request{Partial: p, Hashes: hashes})
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			select {
			case <-f.Done():
				if comes {
					t.Errorf("given up: %v", f.Err())
				}
			case <-time.After(3 * time.Second):
				if !comes {
					t.Error("not given up")
				}
			}
		})
	}
}

// still are hashes of a blob of which nothing comes.
type still struct{ *growing }

func (still) Received() int64 { return 0 }

func TestForgottenBlobIsNotServed(t *testing.T) {
	b := randomBytes(22, 2<<20)
	seed := newNode(t, nil)
	m := seed.seed(b)
	newNode(t, nil).fetch(m, nil, seed.peer()).finish()
	eventually(t, "torrent is loaded", func() bool { return seed.find(m.InfoHash()) != nil })
	seed.Forget(digest.FromBytes(b))
	if seed.find(m.InfoHash()) != nil || len(seed.client.Torrents()) != 0 {
		t.Error("the torrent is still loaded")
	}
	if err := seed.store.Delete(m.Digest); err != nil {
		t.Error(err)
	}
	if seed.load(m.InfoHash()) != nil {
		t.Error("the torrent was loaded again")
	}
}
