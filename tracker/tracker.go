// Package tracker is the role that knows who has what: it takes announces, hands out peers and the metainfo with them
// in one round trip, and shows the swarms on a page. Its state is soft: whatever it forgets is announced again within
// an interval. It moves no byte of any blob, and nothing of a cluster stands still without it.
package tracker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Tracker is one running tracker.
type Tracker struct {
	cfg       Config
	log       *slog.Logger
	m         *metrics
	origins   *cluster.Origins
	store     *store
	metainfos *metainfos
	hosts     *hosts
	names     *names
	questions *questions
	page      page
	health    *transport.Health
	server    *transport.Server
	admin     *transport.Server
}

// New binds the listeners. Run serves.
func New(cfg Config, deps role.Deps) (_ *Tracker, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	hc, err := transport.NewClient(cfg.Client, deps.Log)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	t := &Tracker{cfg: cfg, log: deps.Log, m: newMetrics(deps.Registry), hosts: newHosts(), names: newNames(), questions: newQuestions(), health: transport.NewHealth()}
	if t.origins, err = cluster.NewOrigins(cfg.Origins, cfg.Replicas, cluster.Stall, hc); err != nil {
		return nil, err
	}
	t.store = newStore(time.Duration(cfg.Interval), degreeOf(cfg.PeersPerAnswer), cfg.Limits.bounds())
	if t.metainfos, err = newMetainfos(t.order, int64(cfg.MetainfoMemory), deps.Log, t.m); err != nil {
		return nil, err
	}
	t.metainfos.asked = t.questions
	t.store.known = t.metainfos.has
	t.m.watch(t.store, t.metainfos)
	// A tracker without origins still knows peers: nothing is required for readiness.
	for _, o := range t.origins.All() {
		t.health.AddCheck(o.ID, false, o.Ping)
	}
	if t.server, err = transport.NewServer("tracker", cfg.Server, t.handler(deps.Registry), deps.Log); err != nil {
		return nil, err
	}
	if cfg.Admin.Listen != "" {
		if t.admin, err = transport.NewServer("admin", cfg.Admin, transport.AdminHandler(cfg.Admin, t.health, deps.Registry), deps.Log); err != nil {
			return nil, errors.Join(err, t.server.Close())
		}
	}
	return t, nil
}

// order is whom to ask for the metainfo of d, best first.
func (t *Tracker) order(d digest.Digest) []asker {
	all := t.origins.For(d)
	out := make([]asker, len(all))
	for i, o := range all {
		out[i] = o
	}
	return out
}

// Addr is the address of the main listener.
func (t *Tracker) Addr() string { return t.server.Addr() }

// AdminAddr is the address of the admin listener, empty when there is none.
func (t *Tracker) AdminAddr() string {
	if t.admin == nil {
		return ""
	}
	return t.admin.Addr()
}

// Run serves until ctx is done, then lets requests in flight finish within the server's bound.
func (t *Tracker) Run(ctx context.Context) error {
	defer t.origins.Close()
	var g role.Group
	g.Add("metainfo", t.metainfos.run)
	g.Add("sweep", t.sweep)
	g.Add("confirm", t.confirming)
	if t.admin != nil {
		g.Add("admin", t.admin.Run)
	}
	g.Add("tracker", t.server.Run)
	g.Add("readiness", func(ctx context.Context) error {
		<-ctx.Done()
		t.health.SetDraining()
		return nil
	})
	return g.Run(ctx)
}

// sweepGap lies before a sweep that is wanted before its time, so that one serves many.
const sweepGap = 100 * time.Millisecond

// pause is false when ctx ended meanwhile.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// sweep frees the memory of what has expired. Answers don't wait for it: they pass over it by themselves.
func (t *Tracker) sweep(ctx context.Context) error {
	tick := time.NewTicker(time.Duration(t.cfg.Interval))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-t.store.full:
			if !pause(ctx, sweepGap) {
				return nil
			}
		}
		t.store.sweep()
	}
}
