// Package origin is the blob half of a registry: it keeps layer blobs on disk, sharded over origins by rendezvous hash
// with replicas, computes their metainfo, leases and seeds their pieces, writes them back to a bucket and reads them
// through from it. Bytes are global here: which repository has which blob is build-index's business.
package origin

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/singleflight"
	"golang.org/x/time/rate"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Origin is one running origin.
type Origin struct {
	cfg     Config
	log     *slog.Logger
	m       *metrics
	store   *store.Store
	buckets *bucket.Set
	swarm   seeder
	origins *cluster.Origins
	health  *transport.Health
	server  *transport.Server
	admin   *transport.Server

	leases      *leases
	turns       *turns
	budgets     *budgets
	hashing     singleflight.Group // metainfo of one blob is computed once
	recomputing *recomputations    // of metainfo that agents say is wrong
	fetching    singleflight.Group // one read-through for many readers
	fetches     map[digest.Digest]*fetch
	durable     *lru.Cache[string, bool] // "bucket digest" that were seen in the bucket
	commits     *commits
	kick        chan struct{} // write-back has something to do
	busy        sync.Map      // digest → true while it is written back or moved

	nameKeys   cluster.NameKeys // whose name records are believed; all where there is none
	unsigned   sync.Once        // says in the log that there is none
	refusals   rate.Sometimes   // of records, as the log tells: whoever sends them must not fill it
	unreadable atomic.Int64     // name records on disk, as of the last look

	ctx  context.Context // of background work: ends when the origin does
	stop context.CancelFunc
	wg   sync.WaitGroup

	mu      sync.Mutex
	lastErr error // of write-back
	retry   map[digest.Digest]retry
}

// retry is when to try a blob again.
type retry struct {
	at    time.Time
	delay time.Duration
}

// New opens the store, binds the listeners and finds what is to be written back. Run serves.
func New(cfg Config, deps role.Deps) (_ *Origin, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	o := &Origin{
		cfg: cfg, log: deps.Log, leases: newLeases(cfg.Leasers), turns: newTurns(), budgets: newBudgets(), recomputing: newRecomputations(),
		refusals: rate.Sometimes{First: 3, Interval: 10 * time.Second},
		fetches:  map[digest.Digest]*fetch{},
		kick:     make(chan struct{}, 1), retry: map[digest.Digest]retry{}, health: transport.NewHealth(),
	}
	o.leases.spread = o.turns.spread
	o.ctx, o.stop = context.WithCancel(context.Background())
	var undo []func() error
	defer func() {
		if err != nil {
			o.stop()
			for i := len(undo) - 1; i >= 0; i-- {
				err = errors.Join(err, undo[i]())
			}
		}
	}()
	if o.nameKeys, err = cluster.ParseNameKeys(cfg.RecordKeys); err != nil {
		return nil, fmt.Errorf("record_keys: %w", err)
	}
	if o.durable, err = lru.New[string, bool](100_000); err != nil {
		return nil, err
	}
	if o.commits, err = newCommits(time.Duration(cfg.UploadIdle)); err != nil {
		return nil, err
	}
	hc, err := transport.NewClient(cfg.Client, deps.Log)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	if o.origins, err = cluster.NewOrigins(cfg.Origins, cfg.Replicas, cluster.Stall, hc); err != nil {
		return nil, err
	}
	if o.buckets, err = bucket.OpenAll(o.ctx, cfg.Buckets, bucket.NewMetrics(deps.Registry)); err != nil {
		return nil, err
	}
	if o.store, err = store.Open(store.Config{Dir: cfg.Dir, Capacity: int64(cfg.Capacity), Keep: cfg.Keep, Sessions: cfg.Uploads, Logger: deps.Log, OnEvict: o.evicted, OpenFS: cfg.OpenFS}); err != nil {
		return nil, err
	}
	undo = append(undo, o.store.Close)
	o.m = newMetrics(deps.Registry, o)
	o.store.RegisterMetrics(deps.Registry)
	if o.swarm, err = openSeeder(cfg.Peer, o.store, deps); err != nil {
		return nil, err
	}
	undo = append(undo, o.swarm.Close)
	o.addChecks()
	if o.server, err = transport.NewServer("registry", cfg.Server, o.handler(deps.Registry), deps.Log); err != nil {
		return nil, err
	}
	undo = append(undo, o.server.Close)
	if cfg.Admin.Listen != "" {
		if o.admin, err = transport.NewServer("admin", cfg.Admin, o.adminHandler(deps.Registry), deps.Log); err != nil {
			return nil, err
		}
	}
	return o, nil
}

// addChecks says what readiness asks.
func (o *Origin) addChecks() {
	o.health.AddCheck("name records", false, o.checkNames)
	for _, c := range o.cfg.Buckets {
		b, _ := o.buckets.Get(c.Name)
		o.health.AddCheck("bucket "+c.Name, false, func(ctx context.Context) error {
			_, err := b.Stat(ctx, layout.ProbeKey)
			if errors.Is(err, bucket.ErrNotFound) {
				return nil
			}
			return err
		})
	}
}

// Addr is the address of the registry listener.
func (o *Origin) Addr() string { return o.server.Addr() }

// PeerAddr is the address of the peer listener, of none where peer.off is set.
func (o *Origin) PeerAddr() string { return o.swarm.Addr().String() }

// AdminAddr is the address of the admin listener, empty when there is none.
func (o *Origin) AdminAddr() string {
	if o.admin == nil {
		return ""
	}
	return o.admin.Addr()
}

// Run serves until ctx is done, then drains and closes.
func (o *Origin) Run(ctx context.Context) error {
	defer o.origins.Close()
	var g role.Group
	g.Add("swarm", o.swarm.Run)
	g.Add("background", func(ctx context.Context) error {
		<-ctx.Done()
		o.stop()
		o.wg.Wait()
		return nil
	})
	g.Add("write-back", o.writeback)
	g.Add("housekeeping", o.housekeeping)
	g.Add("scrub", o.store.RunScrub)
	if o.admin != nil {
		g.Add("admin", o.admin.Run)
	}
	g.Add("registry", o.server.Run)
	g.Add("readiness", func(ctx context.Context) error {
		<-ctx.Done()
		o.health.SetDraining()
		return nil
	})
	return errors.Join(g.Run(ctx), o.store.Close())
}

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

// background runs f as long as the origin lives.
func (o *Origin) background(f func(ctx context.Context)) {
	if o.ctx.Err() == nil {
		o.wg.Go(func() { f(o.ctx) })
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
