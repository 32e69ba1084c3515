package swarm

import (
	"encoding/hex"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/anacrolix/torrent/metainfo"
	pp "github.com/anacrolix/torrent/peer_protocol"
	"github.com/opencontainers/go-digest"

	"kraken/origin/swarm/plan"
	"kraken/proto/blob"
)

// loaded is a blob for which the library has a torrent now: it is fetched, or a peer asked for it within IdleTimeout.
type loaded struct {
	s     *Swarm
	m     *blob.Metainfo
	data  *content
	fetch atomic.Pointer[Fetch] // nil: only seeded

	libMu sync.RWMutex
	lib   *torrent.Torrent // nil before it was added, and after it was dropped

	mu    sync.Mutex
	conns map[*conn]struct{}
	dials map[string]*address
	used  time.Time
}

func idText(id [20]byte) string { return hex.EncodeToString(id[:]) }

func parseInfoHash(s string) (ih blob.InfoHash, err error) {
	b, err := hex.DecodeString(s)
	if err != nil || len(b) != len(ih) {
		return ih, fmt.Errorf("info-hash %q: want 40 hex digits", s)
	}
	copy(ih[:], b)
	return ih, nil
}

func (s *Swarm) find(ih blob.InfoHash) *loaded {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.loaded[ih]
}

// add gives the library a torrent. loadMu is held, and the info-hash is not loaded.
func (s *Swarm) add(m *blob.Metainfo, data *content, f *Fetch) *loaded {
	t := &loaded{s: s, m: m, data: data, conns: map[*conn]struct{}{}, dials: map[string]*address{}, used: time.Now()}
	data.limiter, data.gone = s.limiter, make(chan struct{})
	data.copied.Store(s.cfg.TLS.Server != nil)
	t.fetch.Store(f)
	if f != nil {
		f.t = t
	}
	t.libMu.Lock()
	defer t.libMu.Unlock()
	s.mu.Lock()
	s.loaded[m.InfoHash()] = t
	s.mu.Unlock()
	t.lib, _ = s.client.AddTorrentOpt(torrent.AddTorrentOpts{
		InfoHash: metainfo.Hash(m.InfoHash()), InfoBytes: m.InfoBytes(), Storage: data, ChunkSize: pp.Integer(plan.BlockSize(m.PieceLength())),
	})
	if f != nil {
		// Without a handler of ours the library stops to download and may panic on its own bookkeeping.
		t.lib.SetOnWriteChunkError(f.finish)
	}
	return t
}

// load adds a torrent for a whole blob of the store, when a peer asks for it. nil when there is none.
func (s *Swarm) load(ih blob.InfoHash) *loaded {
	s.loadMu.Lock()
	defer s.loadMu.Unlock()
	if t := s.find(ih); t != nil || s.closed {
		return t
	}
	d, ok := s.index.find(ih)
	if !ok {
		return nil
	}
	m, err := s.cfg.Store.Metainfo(d)
	if err != nil || m.InfoHash() != ih {
		s.log.Warn("a blob that peers ask for has lost its metainfo", "digest", d, "error", err)
		return nil
	}
	r, err := s.cfg.Store.OpenYielding(d) // an idle torrent must not keep others from the space
	if err != nil {
		return nil
	}
	if r.Info().Size != m.Size {
		r.Close()
		return nil
	}
	return s.add(m, &content{m: m, file: r}, nil)
}

// bytesSent returns how many bytes of the blob the torrent has sent.
func (t *loaded) bytesSent() (n int64) {
	t.use(func(lib *torrent.Torrent) {
		st := lib.Stats()
		n = st.BytesWrittenData.Int64()
	})
	return n
}

// drop takes a torrent from the library; its connections are closed, its files too. loadMu is held.
func (s *Swarm) drop(t *loaded) {
	if n := t.bytesSent(); n > 0 {
		s.sentBefore[t.m.Digest] += n
	}
	s.mu.Lock()
	delete(s.loaded, t.m.InfoHash())
	s.mu.Unlock()
	t.libMu.Lock()
	lib := t.lib
	t.lib = nil
	t.libMu.Unlock()
	if lib != nil {
		lib.Drop()
	}
}

// use calls fn with the library's torrent, unless it was dropped.
func (t *loaded) use(fn func(*torrent.Torrent)) {
	t.libMu.RLock()
	defer t.libMu.RUnlock()
	if t.lib != nil {
		fn(t.lib)
	}
}

func (t *loaded) touch() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.used = time.Now()
}

// connsOf returns the connections with a peer; s.mu may be held.
func (t *loaded) connsOf(id [20]byte) []*conn {
	t.mu.Lock()
	defer t.mu.Unlock()
	var out []*conn
	for c := range t.conns {
		if c.id == id {
			out = append(out, c)
		}
	}
	return out
}

// Asked lists the blobs that peers are connected for, or were a moment ago: for IdleTimeout, so that no visit is missed
// by who asks more often.
func (s *Swarm) Asked() []digest.Digest {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []digest.Digest
	for _, t := range s.loaded {
		t.mu.Lock()
		if len(t.conns) > 0 || time.Since(t.used) < s.cfg.IdleTimeout {
			out = append(out, t.m.Digest)
		}
		t.mu.Unlock()
	}
	return out
}

// dropIdle drops the torrents that nobody has been connected for.
func (s *Swarm) dropIdle() {
	s.loadMu.Lock()
	defer s.loadMu.Unlock()
	if s.closed {
		return
	}
	s.mu.Lock()
	var idle []*loaded
	for _, t := range s.loaded {
		t.mu.Lock()
		if t.fetch.Load() == nil && len(t.conns) == 0 && time.Since(t.used) >= s.cfg.IdleTimeout {
			idle = append(idle, t)
		}
		t.mu.Unlock()
	}
	s.mu.Unlock()
	for _, t := range idle {
		s.drop(t)
	}
}
