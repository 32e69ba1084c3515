// Package swarm moves blobs between nodes by the BitTorrent protocol (BEP 3, 6, 20, 23, 27). It is the only package
// that meets the anacrolix client, and its interface is small enough to put that client into a process of its own one
// day.
//
// A Swarm seeds every whole blob of a store without an object per blob: a torrent is added when a peer asks for it and
// dropped when nobody does any more. A Fetch fills one partial blob of the store from peers and from Sources (origins
// that lease pieces over HTTP). The package knows no tracker: its user announces, and feeds the peers it was told of.
package swarm

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/anacrolix/torrent"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/origin/store"
	"kraken/origin/swarm/rate"
	"kraken/proto/blob"
	"kraken/proto/config"
	"kraken/proto/transport"
)

// Rates are the limits of a Swarm's traffic, in bytes a second; 0 is unlimited.
type Rates = rate.Limits

// Errors of this package.
var (
	ErrClosed     = errors.New("swarm is closed")
	ErrBusy       = errors.New("blob is being fetched already")
	ErrNoProgress = errors.New("no peer and no origin delivers")
)

// Config configures a Swarm. The zero value of a field is its default.
type Config struct {
	// Listen is the TCP address for peers, ip:port. Port 0 takes a free one.
	Listen string
	// Store holds the blobs. It must outlive the Swarm.
	Store *store.Store
	// StockPeers admits any BitTorrent client. Without it, peers whose id does not begin like ours are refused. A peer
	// id proves nothing: only TLS keeps strangers out.
	StockPeers bool
	// TLS, where set, is spoken on every connection, accepted (Server) and dialled (Client). It excludes StockPeers.
	TLS TLS
	// Rates are the limits to begin with; SetRates changes them.
	Rates
	// LinkRate is the speed of this node's link where that is what bounds pulls, in bytes a second: what peers have on
	// their way here at once is bounded, so that less of it is lost, and what comes from Sources waits behind less. 0:
	// not known.
	LinkRate config.Rate
	// MaxConns bounds the connections with peers in all, MaxConnsPerBlob the ones of one blob. Defaults 1000 and 50.
	// Accepted ones count once their handshakes are done.
	MaxConns, MaxConnsPerBlob int
	// BanTime is how long a peer that sent wrong bytes stays out, default 1h.
	BanTime time.Duration
	// StallTimeout is how long a Fetch may go without a new piece before it reads without a lease from a Source that
	// gives none, and how long one source may go without sending, default 2s.
	StallTimeout time.Duration
	// GiveUp is how long a Fetch may go without a new piece, and without news of Hashes, until it fails with
	// ErrNoProgress, default 1m.
	GiveUp time.Duration
	// IdleTimeout is how long a torrent that nobody asks for is kept, default 1m.
	IdleTimeout time.Duration
	Logger      *slog.Logger
	Registerer  prometheus.Registerer // may be nil
}

// TLS is both sides of mutual TLS between peers. Check, where set, says whether a connection may stay: it is asked
// again and again. Self, where it is not zero, is whom this node's certificate names: its peer id is then the one that
// belongs to that name.
type TLS struct {
	Server, Client *tls.Config
	Check          func(tls.ConnectionState) error
	Self           transport.Principal
}

func (c *Config) setDefaults() error {
	if c.Store == nil {
		return errors.New("swarm: a store is needed")
	}
	if (c.TLS.Server == nil) != (c.TLS.Client == nil) || c.TLS.Server != nil && c.StockPeers {
		return errors.New("swarm: TLS needs both its sides, and excludes stock peers")
	}
	if err := c.Rates.Validate(); err != nil {
		return fmt.Errorf("swarm: %w", err)
	}
	or := func(d *time.Duration, v time.Duration) {
		if *d <= 0 {
			*d = v
		}
	}
	or(&c.BanTime, time.Hour)
	or(&c.StallTimeout, 2*time.Second)
	or(&c.GiveUp, time.Minute)
	or(&c.IdleTimeout, time.Minute)
	if c.MaxConns <= 0 {
		c.MaxConns = 1000
	}
	if c.MaxConnsPerBlob <= 0 {
		c.MaxConnsPerBlob = 50
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return nil
}

// Swarm is one peer of all swarms. It is safe for concurrent use.
//
// Locks, outermost first: loadMu, loaded.libMu, the library's client lock, and then, held for moments only, mu and the
// locks of boards, bans and connections. The library calls back with its lock held, so whoever holds one of the last
// must not call it.
type Swarm struct {
	cfg      Config
	log      *slog.Logger
	client   *torrent.Client
	id       torrent.PeerID
	listener *listener
	limiter  *rate.Limiter
	index    index
	bans     bans
	reach    reach
	slots    slots
	m        *metrics

	descriptors *transport.Descriptors

	loadMu sync.Mutex // adding and dropping torrents
	closed bool       // under loadMu
	// under loadMu: bytes that went to peers by torrents that were dropped since, for each blob that peers may ask for
	sentBefore map[digest.Digest]int64

	mu         sync.Mutex
	loaded     map[blob.InfoHash]*loaded
	conns      map[*conn]struct{} // all, the ones without handshakes included
	unfinished unfinished

	joined    chan struct{} // a peer was connected
	closing   chan struct{}
	closeOnce sync.Once
	wg        sync.WaitGroup // connections and work in the background
}

// New opens the listener and begins to serve peers. Blobs that are in the store already are found by Run.
func New(cfg Config) (*Swarm, error) {
	if err := cfg.setDefaults(); err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		return nil, fmt.Errorf("listen for peers: %w", err)
	}
	s := &Swarm{
		cfg: cfg, log: cfg.Logger, loaded: map[blob.InfoHash]*loaded{}, conns: map[*conn]struct{}{}, closing: make(chan struct{}),
		joined: make(chan struct{}, 1), descriptors: transport.NewDescriptors(),
		sentBefore: map[digest.Digest]int64{},
	}
	s.index.init()
	s.bans.time = cfg.BanTime
	s.limiter = rate.NewLimiter(cfg.Rates)
	if s.client, err = torrent.NewClient(s.clientConfig()); err != nil {
		return nil, errors.Join(fmt.Errorf("start BitTorrent client: %w", err), l.Close())
	}
	s.id = s.client.PeerID()
	if s.m, err = newMetrics(s, cfg.Registerer); err != nil {
		s.client.Close()
		return nil, errors.Join(err, l.Close())
	}
	s.listener = &listener{Listener: l, s: s}
	s.client.AddDialer(dialer{s})
	s.client.AddListener(s.listener)
	if cfg.LinkRate > 0 {
		s.wg.Go(s.shareLink)
	}
	s.log.Info("listening", slog.String("listener", "peers"), slog.Any("addr", s.Addr()), cfg.Rates.Attr())
	return s, nil
}

// Addr returns the address that the listener is bound to.
func (s *Swarm) Addr() netip.AddrPort {
	ap := s.listener.Listener.Addr().(*net.TCPAddr).AddrPort()
	return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
}

// PeerID returns this node's peer id: the one of its certificate's identity, and without one new at every start.
func (s *Swarm) PeerID() [20]byte { return s.id }

// Run finds the blobs of the store that can be seeded, drops idle torrents until ctx is done, and closes the Swarm.
func (s *Swarm) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	wg.Go(func() { s.scan(ctx) })
	t := time.NewTicker(max(s.cfg.IdleTimeout/4, time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			wg.Wait()
			return s.Close()
		case <-s.closing:
			wg.Wait()
			return s.Close()
		case <-t.C:
			s.dropIdle()
			s.dropDenied()
			s.bans.expire()
		}
	}
}

// dropDenied ends the connections whose certificate is not accepted any more.
func (s *Swarm) dropDenied() {
	if s.cfg.TLS.Check == nil {
		return
	}
	s.mu.Lock()
	all := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range all {
		t, ok := c.Conn.(*tls.Conn)
		if !ok {
			continue
		}
		if err := s.cfg.TLS.Check(t.ConnectionState()); err != nil {
			s.log.Warn("peer is disconnected", "peer", c.address.addr, "error", err)
			c.Close()
		}
	}
}

// scan indexes what is in the store. One blob costs the reading of its metainfo.
func (s *Swarm) scan(ctx context.Context) {
	select {
	case <-s.cfg.Store.Scanned():
	case <-s.closing:
		return
	case <-ctx.Done():
		return
	}
	n := 0
	err := s.cfg.Store.List(func(i store.Info) error {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.closing:
			return ErrClosed
		default:
		}
		m, err := s.cfg.Store.Metainfo(i.Digest)
		if err != nil {
			return nil // not hashed yet: whoever does it calls Register
		}
		s.Register(m)
		n++
		return nil
	})
	if err == nil {
		s.log.Debug("seeding what is in the store", "blobs", n)
	}
}

// Register lets peers ask for a blob from now on. The store has it whole, and its metainfo.
func (s *Swarm) Register(m *blob.Metainfo) {
	if m.NumPieces() > 0 {
		s.index.add(m.InfoHash(), m.Digest)
	}
}

// Seeds reports whether peers can ask for the blob: Register was called, or Run has found it.
func (s *Swarm) Seeds(d digest.Digest) bool { return s.index.has(d) }

// Forget ends that peers can ask for a blob, which has left the store. Peers that are fetching it are disconnected.
func (s *Swarm) Forget(d digest.Digest) {
	s.loadMu.Lock() // a fetch that has just ended opens the blob and registers it with this lock
	defer s.loadMu.Unlock()
	s.index.remove(d)
	for _, t := range s.loadedOf(d) {
		if t.fetch.Load() == nil {
			s.drop(t)
		}
	}
	delete(s.sentBefore, d)
}

// loadedOf returns the torrents of a blob: what arrived has another info-hash than the blob that it became.
func (s *Swarm) loadedOf(d digest.Digest) (out []*loaded) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.loaded {
		if t.m.Digest == d {
			out = append(out, t)
		}
	}
	return out
}

// BytesSent returns how many bytes of each blob went to peers since the start; a blob that none has asked for, or that
// was forgotten, is not in it.
func (s *Swarm) BytesSent() map[digest.Digest]int64 {
	s.loadMu.Lock() // so that no torrent is dropped, and counted twice or not at all, meanwhile
	defer s.loadMu.Unlock()
	out := maps.Clone(s.sentBefore)
	s.mu.Lock()
	ts := slices.Collect(maps.Values(s.loaded))
	s.mu.Unlock()
	for _, t := range ts {
		if n := t.bytesSent(); n > 0 {
			out[t.m.Digest] += n
		}
	}
	return out
}

// Rates returns the limits as they are now.
func (s *Swarm) Rates() Rates { return s.limiter.Limits() }

// SetRates changes the limits, at once for all that is under way, too.
func (s *Swarm) SetRates(r Rates) error {
	return s.limiter.Change(func(now *Rates) error { *now = r; return nil })
}

// LimitUpload returns the body of a blob kept to the upload rates, to be sent over HTTP: the body itself while there
// are none.
func (s *Swarm) LimitUpload(ctx context.Context, d digest.Digest, body io.ReadSeeker) io.ReadSeeker {
	return s.limiter.Upload(ctx, d, body)
}

// LimitDownload returns r, which reads a blob that comes over HTTP, kept to the download rates.
func (s *Swarm) LimitDownload(ctx context.Context, d digest.Digest, r io.Reader) io.Reader {
	return s.limiter.Download(ctx, d, r)
}

// Bans lists the peers that are kept out.
func (s *Swarm) Bans() []Ban { return s.bans.list() }

// Close ends all fetches and connections and waits for them. Further calls wait for the first.
func (s *Swarm) Close() error {
	s.closeOnce.Do(func() {
		close(s.closing)
		s.loadMu.Lock()
		s.closed = true
		fetches := s.fetches()
		s.loadMu.Unlock()
		for _, f := range fetches {
			f.finish(ErrClosed)
			f.Close()
		}
		s.client.Close()
		// Not before the client is closed: its accept loop would spin.
		if err := s.listener.Listener.Close(); err != nil {
			s.log.Debug("close listener for peers", "error", err)
		}
		s.mu.Lock()
		conns := make([]*conn, 0, len(s.conns))
		for c := range s.conns {
			conns = append(conns, c)
		}
		s.mu.Unlock()
		for _, c := range conns {
			c.Close()
		}
		s.m.unregister()
	})
	s.wg.Wait()
	return nil
}

func (s *Swarm) fetches() []*Fetch {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*Fetch
	for _, t := range s.loaded {
		if f := t.fetch.Load(); f != nil {
			out = append(out, f)
		}
	}
	return out
}

// index finds the blob of an info-hash: about 200 bytes a blob, for blobs that may never be asked for.
type index struct {
	mu     sync.Mutex
	digest map[blob.InfoHash]digest.Digest
	hash   map[digest.Digest]blob.InfoHash
}

func (x *index) init() {
	x.digest, x.hash = map[blob.InfoHash]digest.Digest{}, map[digest.Digest]blob.InfoHash{}
}

func (x *index) add(ih blob.InfoHash, d digest.Digest) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if old, ok := x.hash[d]; ok {
		delete(x.digest, old)
	}
	x.digest[ih], x.hash[d] = d, ih
}

func (x *index) remove(d digest.Digest) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.digest, x.hash[d])
	delete(x.hash, d)
}

func (x *index) find(ih blob.InfoHash) (digest.Digest, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	d, ok := x.digest[ih]
	return d, ok
}

func (x *index) has(d digest.Digest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	_, ok := x.hash[d]
	return ok
}

func (x *index) len() int {
	x.mu.Lock()
	defer x.mu.Unlock()
	return len(x.hash)
}

// each calls fn with the info-hashes until it returns false.
func (x *index) each(fn func(skey []byte) bool) {
	x.mu.Lock()
	all := make([]blob.InfoHash, 0, len(x.digest))
	for ih := range x.digest {
		all = append(all, ih)
	}
	x.mu.Unlock()
	for i := range all {
		if !fn(all[i][:]) {
			return
		}
	}
}
