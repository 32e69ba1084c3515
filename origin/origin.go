// Package origin is the blob half of a registry: it keeps layer blobs on disk, sharded over origins by rendezvous hash
// with replicas, computes their metainfo, leases and seeds their pieces, writes them back to a bucket and reads them
// through from it. Bytes are global here: which repository has which blob is build-index's business.
package origin

import (
	"context"

	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/jellydator/ttlcache/v3"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Origin is one running origin.
type Origin struct {
	*role.Chassis
	cfg     Config
	log     *slog.Logger
	m       *metrics
	store   *store.Store
	buckets *bucket.Set
	swarm   seeder
	origins *cluster.Origins

	leases      *leases
	turns       *turns
	budgets     *budgets
	hashing     singleflight.Group // metainfo of one blob is computed once
	recomputing *recomputations    // of metainfo that agents say is wrong
	fetching    singleflight.Group // one read-through for many readers
	waiting     *upstream.Budget   // of those that wait for an upstream's first byte
	behind      *upstream.Budget   // of those whose reader has gone meanwhile, where the blob is passed on
	patience    time.Duration      // with an upstream's first byte
	fetches     map[fetchID]*fetch
	durable     *lru.Cache[string, bool]             // "bucket digest" that are in the bucket, verified; false: other bytes are
	looks       looks                                // for what is in the buckets
	vouching    sync.Map                             // digest → true while it is hashed before its debt is taken over
	vouched     *lru.Cache[digest.Digest, time.Time] // when a large one was hashed for that, and was right
	checking    sync.Map                             // "bucket digest" → true while the bucket's bytes are hashed
	checks      chan struct{}                        // a slot for each of these
	upstreams   *upstream.Set
	segments    segmentSlots
	answers     *answers
	refused     *ttlcache.Cache[fetchID, error]
	commits     *commits
	kick        chan struct{} // write-back has something to do
	busy        sync.Map      // digest → true while it is written back or moved
	monitor     *bucket.Monitor

	nameKeys   cluster.NameKeys // whose name records are believed; all where there is none
	unsigned   sync.Once        // says in the log that there is none
	refusals   rate.Sometimes   // of records, as the log tells: whoever sends them must not fill it
	unreadable atomic.Int64     // name records on disk, as of the last look

	holder holder // the build-index that may be the only one

	tries tries // of write-back

	mu sync.Mutex // guards fetches
}

// New opens the store, binds the listeners and finds what is to be written back. Run serves.
func New(cfg Config, deps role.Deps) (*Origin, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	o := &Origin{
		cfg: cfg, log: deps.Log, leases: newLeases(cfg.Leasers), turns: newTurns(), budgets: newBudgets(), recomputing: newRecomputations(),
		segments: make(segmentSlots, maxSegments), answers: newAnswers(), waiting: upstream.NewBudget("blobs of upstreams are waited for", maxAsking),
		behind: upstream.NewBudget("blobs of upstreams are waited for without a reader", maxBehind), patience: upstreamPatience,
		refusals: rate.Sometimes{First: 3, Interval: 10 * time.Second},
		looks:    looks{log: rate.Sometimes{First: 3, Interval: 10 * time.Second}},
		fetches:  map[fetchID]*fetch{},
		checks:   make(chan struct{}, 2),
		kick:     make(chan struct{}, 1),
	}
	o.leases.spread = o.turns.spread
	if err := role.Open(cfg.Config, deps, cluster.Stall, o.assemble); err != nil {
		return nil, err
	}
	return o, nil
}

// assemble puts the origin on its chassis.
func (o *Origin) assemble(c *role.Chassis) (err error) {
	o.Chassis, o.origins = c, c.Origins
	if o.nameKeys, err = cluster.ParseNameKeys(o.cfg.RecordKeys); err != nil {
		return fmt.Errorf("record_keys: %w", err)
	}
	if o.durable, err = lru.New[string, bool](100_000); err != nil {
		return err
	}
	if o.vouched, err = lru.New[digest.Digest, time.Time](1000); err != nil {
		return err
	}
	o.refused = ttlcache.New(ttlcache.WithTTL[fetchID, error](refuseFor), ttlcache.WithCapacity[fetchID, error](10_000), ttlcache.WithDisableTouchOnHit[fetchID, error]())
	if o.upstreams, err = upstream.Open(o.cfg.Upstreams, upstream.Options{Log: o.log, Metrics: c.Registry}); err != nil {
		return err
	}
	c.Undo(func() error { o.upstreams.Close(); return nil })
	if o.commits, err = newCommits(time.Duration(o.cfg.UploadIdle)); err != nil {
		return err
	}
	if o.buckets, err = bucket.OpenAll(c.Context(), o.cfg.Buckets, bucket.NewMetrics(c.Registry)); err != nil {
		return err
	}
	if err := o.openDisk(c); err != nil {
		return err
	}
	o.monitor = bucket.NewMonitor(o.buckets, layout.ProbeKey, o.log, func() int { n, _ := o.store.Debts(); return n }, o.bucketIsBack)
	o.addChecks(c.Health)
	c.Part("background", c.EndBackground)
	c.Part("buckets", o.monitor.Run)
	c.Part("write-back", o.writeback)
	c.Part("housekeeping", o.housekeeping)
	c.Part("scrub", o.store.RunScrub)
	h, err := o.handler(c.Registry)
	if err != nil {
		return err
	}
	return c.Serve("registry", h, o.adminRoutes, o.store.ControlRoutes, o.swarm.ControlRoutes)
}

// openDisk opens the store and binds the peer listener that seeds from it.
func (o *Origin) openDisk(c *role.Chassis) (err error) {
	o.store, err = store.Open(store.Config{
		Dir: o.cfg.Dir, Capacity: int64(o.cfg.Capacity), Keep: o.cfg.Keep, Sessions: o.cfg.Uploads, Logger: o.log, OnEvict: o.evicted, OnRotten: o.rotten,
		OpenFS: o.cfg.OpenFS,
	})
	if err != nil {
		return err
	}
	c.Closes(o.store.Close)
	o.m = newMetrics(c.Registry, o)
	o.store.RegisterMetrics(c.Registry)
	if o.swarm, err = openSeeder(o.cfg.Peer, o.store, c); err != nil {
		return err
	}
	c.Undo(o.swarm.Close)
	c.Part("swarm", o.swarm.Run)
	return nil
}

// addChecks says what readiness asks.
func (o *Origin) addChecks(h *transport.Health) {
	h.AddCheck("disk", false, o.store.CheckSpace)
	h.AddCheck("name records", false, o.checkNames)
	for _, c := range o.cfg.Buckets {
		h.AddCheck("bucket "+c.Name, false, func(ctx context.Context) error { return o.monitor.Check(ctx, c.Name) })
	}
}

// PeerAddr is the address of the peer listener, of none where peer.off is set.
func (o *Origin) PeerAddr() string { return o.swarm.Addr().String() }

func (o *Origin) housekeeping(ctx context.Context) error {
	// A session outlives its idle time by a quarter of it at most.
	t := time.NewTicker(min(time.Minute, max(time.Second, time.Duration(o.cfg.UploadIdle)/4)))
	defer t.Stop()
	for {
		if n := o.store.ExpireUploads(time.Duration(o.cfg.UploadIdle)); n > 0 {
			o.log.Info("removed idle upload sessions", "sessions", n)
		}
		o.leases.forget(10 * time.Minute)
		o.budgets.forget()
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
	}
}

func (o *Origin) evicted(d digest.Digest) {
	o.m.evicted.Inc()
	o.leases.drop(d)
	if o.swarm != nil {
		o.swarm.Forget(d)
	}
}

// others are the other origins in rendezvous order.
func (o *Origin) others(d digest.Digest) []*cluster.Origin {
	var out []*cluster.Origin
	for _, or := range o.origins.For(d) {
		if or.ID != o.cfg.ID {
			out = append(out, or)
		}
	}
	return out
}
