// Package agent is the role that runs once per node: a read-only OCI registry on localhost for kubelet, containerd,
// docker and podman, which resolves names at build-index, fetches blobs from the swarm, streams them while they arrive,
// and seeds what it has. It is a cache: every byte on its disk can be lost. It takes no pushes, and it knows nothing
// about buckets.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2"
	"github.com/hashicorp/golang-lru/v2/expirable"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/singleflight"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/announce"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Budgets of the control plane: what a pull waits at most for an answer before it goes on without.
const (
	trackerBudget  = time.Second
	metainfoBudget = 3 * time.Second
)

// Agent is one running agent.
type Agent struct {
	cfg         Config
	log         *slog.Logger
	m           *metrics
	store       *store.Store
	swarm       *swarm.Swarm
	origins     *cluster.Origins
	index       *cluster.IndexClient // build-index
	indexHealth *indexHealth         // whether it answers
	announcer   *announcer
	health      *transport.Health
	server      *transport.Server
	admin       *transport.Server
	smallBlob   int64

	sizes   *lru.Cache[digest.Digest, int64] // of blobs, from the manifests that passed by
	checked *expirable.LRU[string, string]   // "repo@digest" → media type: manifests lately confirmed
	resolve singleflight.Group               // one request to build-index for any number of askers

	ctx     context.Context // of pulls: ends when the agent does
	stop    context.CancelFunc
	wg      sync.WaitGroup
	mu      sync.Mutex
	pulls   map[digest.Digest]*pull
	closing bool
}

// New opens the cache, binds the listeners and reports what is wrong with either. Run serves.
func New(cfg Config, deps role.Deps) (_ *Agent, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, log: deps.Log, m: newMetrics(deps.Registry), pulls: map[digest.Digest]*pull{}, smallBlob: int64(cfg.SmallBlob)}
	a.ctx, a.stop = context.WithCancel(context.Background())
	var undo []func() error
	defer func() {
		if err != nil {
			a.stop()
			for i := len(undo) - 1; i >= 0; i-- {
				err = errors.Join(err, undo[i]())
			}
		}
	}()

	hc, err := transport.NewClient(cfg.Client, deps.Log)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if a.origins, err = cluster.NewOrigins(cfg.Origins, cfg.Replicas, time.Duration(cfg.Peer.StallTimeout), hc); err != nil {
		return nil, err
	}
	if a.index, err = cluster.NewIndexClient(cfg.BuildIndex.URL, hc); err != nil {
		return nil, fmt.Errorf("build_index: %w", err)
	}
	if a.indexHealth, err = newIndexHealth(cfg.BuildIndex.URL, time.Duration(cfg.BuildIndexWait), time.Duration(cfg.Client.DialTimeout)); err != nil {
		return nil, err
	}
	if a.sizes, err = lru.New[digest.Digest, int64](knownSizes); err != nil {
		return nil, err
	}
	a.checked = expirable.NewLRU[string, string](knownManifests, nil, time.Duration(cfg.ManifestTTL))

	a.store, err = store.Open(store.Config{Dir: cfg.Cache.Dir, Capacity: int64(cfg.Cache.Capacity), Keep: cfg.Cache.Keep, Volatile: true, Logger: deps.Log, OnEvict: a.evicted})
	if err != nil {
		return nil, fmt.Errorf("cache: %w", err)
	}
	undo = append(undo, a.store.Close)
	a.store.RegisterMetrics(deps.Registry)
	peers, err := cfg.Peer.TLS.Configs(deps.Log)
	if err != nil {
		return nil, fmt.Errorf("peer: %w", err)
	}
	a.swarm, err = swarm.New(swarm.Config{
		Listen: cfg.Peer.Listen, Store: a.store, StockPeers: cfg.Peer.StockPeers, TLS: swarm.TLS(peers),
		Rates: cfg.Peer.rates(), LinkRate: cfg.Peer.LinkRate, StallTimeout: time.Duration(cfg.Peer.StallTimeout), Logger: deps.Log, Registerer: deps.Registry,
	})
	if err != nil {
		return nil, fmt.Errorf("peer: %w", err)
	}
	undo = append(undo, a.swarm.Close)
	addr, err := peerAddr(cfg.Peer.Advertise, a.swarm.Addr())
	if err != nil {
		return nil, err
	}
	th, err := trackerClient(cfg.Client, addr, deps.Log)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	a.announcer = newAnnouncer(a, announce.NewClient(cfg.Tracker.URL, th), a.self(addr), deps.Log, a.m.trackerErrors)

	a.health = transport.NewHealth()
	a.health.AddCheck("build-index", false, func(ctx context.Context) error { return a.index.Ping(ctx) })
	a.health.AddCheck("tracker", false, func(context.Context) error { return a.announcer.state() })
	if a.server, err = transport.NewServer("registry", cfg.Server, a.handler(deps.Registry), deps.Log); err != nil {
		return nil, err
	}
	undo = append(undo, a.server.Close)
	if cfg.Admin.Listen != "" {
		if a.admin, err = transport.NewServer("admin", cfg.Admin, a.adminHandler(deps.Registry), deps.Log); err != nil {
			return nil, err
		}
		undo = append(undo, a.admin.Close)
	}
	return a, nil
}

// Sizes of the caches in memory, in entries of about 100 bytes.
const (
	knownSizes     = 100_000
	knownManifests = 10_000
)

// Addr is the address of the registry listener.
func (a *Agent) Addr() string { return a.server.Addr() }

// PeerAddr is the address of the peer listener.
func (a *Agent) PeerAddr() string { return a.swarm.Addr().String() }

// AdminAddr is the address of the admin listener, empty when there is none.
func (a *Agent) AdminAddr() string {
	if a.admin == nil {
		return ""
	}
	return a.admin.Addr()
}

// Run serves until ctx is done, then drains: readiness turns false, requests in flight finish within the server's
// bound, pulls end and keep what they have, the tracker is told, the cache is closed.
func (a *Agent) Run(ctx context.Context) error {
	defer a.origins.Close()
	var g role.Group
	g.Add("swarm", a.swarm.Run)
	g.Add("announcer", a.announcer.run)
	g.Add("housekeeping", a.housekeeping)
	g.Add("scrub", a.store.RunScrub)
	g.Add("disk", a.store.RunSync)
	g.Add("pulls", func(ctx context.Context) error {
		<-ctx.Done()
		a.mu.Lock()
		a.closing = true
		a.mu.Unlock()
		a.stop()
		a.wg.Wait()
		return nil
	})
	if a.admin != nil {
		g.Add("admin", a.admin.Run)
	}
	g.Add("registry", a.server.Run)
	g.Add("readiness", func(ctx context.Context) error {
		<-ctx.Done()
		a.health.SetDraining()
		return nil
	})
	return errors.Join(g.Run(ctx), a.store.Close())
}

// partialIdle is how long a partial blob that nobody fetches is kept for the next pull; it takes space that nothing
// else may evict.
const partialIdle = 6 * time.Hour

// housekeeping removes upload sessions that a crash left behind, and partial blobs that nobody came back for.
func (a *Agent) housekeeping(ctx context.Context) error {
	t := time.NewTicker(time.Minute)
	defer t.Stop()
	var swept time.Time
	for {
		if time.Since(swept) > partialIdle/6 {
			swept = time.Now()
			if n, err := a.store.DropPartials(partialIdle); err != nil || n > 0 {
				a.log.Info("removed partial blobs that nobody came back for", "blobs", n, "error", err)
			}
		}
		if n := a.store.ExpireUploads(10 * time.Minute); n > 0 {
			a.log.Info("removed fetches that were cut off", "sessions", n)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

// evicted tells the swarm and the tracker that a blob has gone: it made room for others, or was rotten.
func (a *Agent) evicted(d digest.Digest) {
	a.m.evicted.Inc()
	if a.swarm != nil {
		a.swarm.Forget(d)
	}
	if a.announcer != nil {
		a.announcer.gone(d)
	}
}

// StatBlob answers from the cache, from a pull in flight or from an origin's metadata, and never downloads.
func (a *Agent) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	if info, err := a.store.Stat(d); err == nil {
		return v1.Descriptor{Digest: d, Size: info.Size}, nil
	}
	if m, err := a.store.Metainfo(d); err == nil {
		return v1.Descriptor{Digest: d, Size: m.Size}, nil
	}
	return a.origins.StatBlob(ctx, repo, d)
}

// OpenBlob opens the cached file, or joins the download of d and streams it while it arrives, or, when it is small,
// once it is verified.
func (a *Agent) OpenBlob(ctx context.Context, repo string, d digest.Digest, _ registry.Range) (*registry.Content, error) {
	for {
		r, err := a.store.Open(d)
		if err == nil {
			a.m.hits.Inc()
			return &registry.Content{Digest: d, Size: r.Info().Size, File: r.File(), Close: r.Close}, nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		p, wait, err := a.join(repo, d, errors.Is(err, store.ErrNotFound))
		if err != nil {
			return nil, err
		}
		if p == nil {
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		select {
		case <-p.ready:
		case <-ctx.Done():
			a.leave(p)
			return nil, context.Cause(ctx)
		}
		if p.body == nil {
			<-p.done
			a.leave(p)
			err := p.err
			if p.second != nil { // nobody has got wrong bytes yet, and another try has begun
				select {
				case <-p.second.done:
				case <-ctx.Done():
					return nil, context.Cause(ctx)
				}
				err = p.second.err
			}
			switch {
			case err == nil:
				continue
			case errors.Is(err, errAbandoned):
				continue // the reader before us left just as we came
			case a.ctx.Err() != nil:
				return nil, fmt.Errorf("%w: %w: %w", registry.ErrUnavailable, errShuttingDown, err)
			}
			return nil, err
		}
		a.m.misses.Inc()
		s := newStream(ctx, p)
		var once sync.Once
		return &registry.Content{Digest: d, Size: p.size, Body: s, Close: func() error {
			once.Do(func() {
				s.close()
				a.leave(p)
			})
			return nil
		}}, nil
	}
}
