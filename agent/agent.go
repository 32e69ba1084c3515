// Package agent is the role that runs once per node: a read-only OCI registry on localhost for kubelet, containerd,
// docker and podman, which resolves names at build-index, fetches blobs from the swarm, streams them while they arrive,
// and seeds what it has. It is a cache: every byte on its disk can be lost. It takes no pushes, and it knows nothing
// about buckets.
package agent

import (
	"context"
	"crypto/rand"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/jellydator/ttlcache/v3"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/announce"
	"kraken/proto/cluster"
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
	*role.Chassis
	cfg         Config
	log         *slog.Logger
	m           *metrics
	store       *store.Store
	swarm       *swarm.Swarm
	origins     *cluster.Origins
	index       *cluster.IndexClient // build-index
	indexHealth *indexHealth         // whether it answers
	namer       *cluster.Namer       // which repository a runtime means
	hub         *transport.Server    // stands for docker.io; nil where there is none
	alive       alive
	announcer   *announcer
	smallBlob   int64

	sizes     *lru.Cache[digest.Digest, int64] // of blobs, from the manifests that passed by
	members   members                          // what blobs of which repositories may be read
	manifests members                          // which manifests repositories have
	door      *ownAccess                       // nil: everybody may pull the cluster's own repositories
	audit     *recorder
	doubts    *doubts
	checked   *ttlcache.Cache[string, string]          // "repo@digest" → media type: manifests lately confirmed
	wrong     *ttlcache.Cache[digest.Digest, []string] // ids of origins that lately sent other bytes to a relay
	full      atomic.Bool                              // the last pull found no room in the cache
	refused   *ttlcache.Cache[cutBlob, cutBody]        // blobs of upstreams of which a body was cut off a moment ago
	granted   *ttlcache.Cache[string, struct{}]        // what repositories callers were let into a moment ago
	tokens    *tokens                                  // of the agent's realm
	had       *ttlcache.Cache[string, struct{}]        // "repo@digest" of manifests whose blobs can be had
	resolve   singleflight.Group                       // one request to build-index for any number of askers

	ctx       context.Context // of pulls: ends when the agent does
	stop      context.CancelFunc
	wg        sync.WaitGroup
	callerKey [32]byte // of the hashes of what callers present

	mu      sync.Mutex
	pulls   map[digest.Digest]*pull
	closing bool
}

// New opens the cache, binds the listeners and reports what is wrong with either. Run serves.
func New(cfg Config, deps role.Deps) (*Agent, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{cfg: cfg, log: deps.Log, m: newMetrics(deps.Registry), pulls: map[digest.Digest]*pull{}, smallBlob: int64(cfg.SmallBlob)}
	a.ctx, a.stop = context.WithCancel(context.Background())
	rand.Read(a.callerKey[:]) // never fails
	if err := role.Open(cfg.Config, deps, time.Duration(cfg.Peer.StallTimeout), a.assemble); err != nil {
		a.stop()
		return nil, err
	}
	return a, nil
}

// lately remembers up to n values, each for ttl after it was set.
func lately[K comparable, V any](n uint64, ttl time.Duration) *ttlcache.Cache[K, V] {
	return ttlcache.New(ttlcache.WithTTL[K, V](ttl), ttlcache.WithCapacity[K, V](n), ttlcache.WithDisableTouchOnHit[K, V]())
}

// assemble puts the agent on its chassis.
func (a *Agent) assemble(c *role.Chassis) (err error) {
	a.Chassis, a.origins = c, c.Origins
	if a.index, err = cluster.NewIndexClient(a.cfg.BuildIndex.URL, c.Client); err != nil {
		return fmt.Errorf("build_index: %w", err)
	}
	if a.indexHealth, err = newIndexHealth(a.cfg.BuildIndex.URL, time.Duration(a.cfg.BuildIndexWait), a.cfg.Client.Dialer()); err != nil {
		return err
	}
	if a.sizes, err = lru.New[digest.Digest, int64](knownSizes); err != nil {
		return err
	}
	a.doubts = newDoubts()
	a.checked = lately[string, string](knownManifests, time.Duration(a.cfg.ManifestTTL))
	a.wrong = lately[digest.Digest, []string](1000, rememberWrong)
	a.refused = lately[cutBlob, cutBody](knownManifests, refuseFor)
	a.had = lately[string, struct{}](knownManifests, hadFor)
	a.namer = cluster.NewNamer(a.cfg.Names)
	a.granted = lately[string, struct{}](knownGrants, grantedFor)
	if a.tokens, err = newTokens(); err != nil {
		return err
	}
	if a.members, err = newMembers(); err != nil {
		return err
	}
	if a.manifests, err = newMembers(); err != nil {
		return err
	}
	if a.audit, err = a.openRecorder(); err != nil {
		return fmt.Errorf("access.audit: %w", err)
	}
	c.Closes(a.audit.Close)
	if a.door, err = a.openAccess(c); err != nil {
		return err
	}
	if err := a.openCache(c); err != nil {
		return err
	}
	if err := a.openSwarm(c); err != nil {
		return fmt.Errorf("peer: %w", err)
	}
	c.Health.AddCheck("disk", false, a.store.CheckSpace)
	c.Health.AddCheck("build-index", false, a.index.Ping)
	c.Health.AddCheck("peers", false, a.swarm.CheckPeers)
	c.Health.AddCheck("tracker", false, func(context.Context) error { return a.announcer.state() })
	c.Part("announcer", a.announcer.run)
	c.Part("housekeeping", a.housekeeping)
	c.Part("scrub", a.store.RunScrub)
	c.Part("disk", a.store.RunSync)
	c.Part("pulls", a.endPulls)
	c.Part("background", c.EndBackground)
	c.Part("upstreams", a.watchUpstreams)
	return a.listen(c)
}

// openCache opens the store.
func (a *Agent) openCache(c *role.Chassis) (err error) {
	a.store, err = store.Open(store.Config{
		Dir: a.cfg.Cache.Dir, Capacity: int64(a.cfg.Cache.Capacity), Keep: a.cfg.Cache.Keep, Volatile: true, Logger: a.log, OnEvict: a.evicted,
	})
	if err != nil {
		return fmt.Errorf("cache: %w", err)
	}
	c.Closes(a.store.Close)
	a.store.RegisterMetrics(c.Registry)
	return nil
}

// openSwarm binds the peer listener and makes the announcer, which tells the tracker of it.
func (a *Agent) openSwarm(c *role.Chassis) error {
	c.WatchCertificates(a.cfg.Peer.TLS.Cert, a.cfg.Peer.TLS.CA)
	peers, err := a.cfg.Peer.TLS.Configs(c.AdmitPeer, a.log)
	if err != nil {
		return err
	}
	a.swarm, err = swarm.New(swarm.Config{
		Listen: a.cfg.Peer.Listen, Store: a.store, StockPeers: a.cfg.Peer.StockPeers, TLS: swarm.TLS(peers), Rates: a.cfg.Peer.rates(),
		LinkRate: a.cfg.Peer.LinkRate, StallTimeout: time.Duration(a.cfg.Peer.StallTimeout), Logger: a.log, Registerer: c.Registry,
	})
	if err != nil {
		return err
	}
	c.Undo(a.swarm.Close)
	c.Part("swarm", a.swarm.Run)
	addr, err := peerAddr(a.cfg.Peer.Advertise, a.swarm.Addr())
	if err != nil {
		return err
	}
	th, err := trackerClient(a.cfg.Client, addr, a.log)
	if err != nil {
		return err
	}
	a.announcer = newAnnouncer(a, announce.NewClient(a.cfg.Tracker.URL, th), a.self(addr), a.log, a.m.trackerErrors)
	return nil
}

// endPulls ends all pulls when ctx ends, and waits for them; they keep what they have.
func (a *Agent) endPulls(ctx context.Context) error {
	<-ctx.Done()
	a.mu.Lock()
	a.closing = true
	a.mu.Unlock()
	a.stop()
	a.wg.Wait()
	return nil
}

// Sizes of the caches in memory, in entries of about 100 bytes.
const (
	knownSizes     = 100_000
	knownManifests = 10_000
)

// DockerHubAddr is the address of the listener that stands for docker.io, empty when there is none.
func (a *Agent) DockerHubAddr() string {
	if a.hub == nil {
		return ""
	}
	return a.hub.Addr()
}

// PeerAddr is the address of the peer listener.
func (a *Agent) PeerAddr() string { return a.swarm.Addr().String() }

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
