// Package tracker is the role that knows who has what: it takes announces, hands out peers and the metainfo with them
// in one round trip, and shows the swarms on a page. Its state is soft: whatever it forgets is announced again within
// an interval. It moves no byte of any blob, and nothing of a cluster stands still without it.
package tracker

import (
	"context"
	"log/slog"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/role"
)

// Tracker is one running tracker.
type Tracker struct {
	*role.Chassis
	cfg       Config
	log       *slog.Logger
	m         *metrics
	origins   *cluster.Origins
	store     *store
	metainfos *metainfos
	hosts     *hosts
	resolver  *resolver
	questions *questions
	page      page
}

// New binds the listeners. Run serves.
func New(cfg Config, deps role.Deps) (*Tracker, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	t := &Tracker{cfg: cfg, log: deps.Log, m: newMetrics(deps.Registry), hosts: newHosts(), resolver: newResolver(), questions: newQuestions()}
	if err := role.Open(cfg.Config, deps, cluster.Stall, t.assemble); err != nil {
		return nil, err
	}
	return t, nil
}

// assemble puts the tracker on its chassis.
func (t *Tracker) assemble(c *role.Chassis) (err error) {
	t.Chassis, t.origins = c, c.Origins
	t.store = newStore(time.Duration(t.cfg.Interval), degreeOf(t.cfg.PeersPerAnswer), t.cfg.Limits.bounds())
	if t.metainfos, err = newMetainfos(t.order, int64(t.cfg.MetainfoMemory), t.log, t.m); err != nil {
		return err
	}
	t.metainfos.asked = t.questions
	t.store.known = t.metainfos.has
	t.m.watch(t.store, t.metainfos)
	// A tracker without origins still knows peers: nothing is required for readiness.
	for _, o := range t.origins.All() {
		c.Health.AddCheck(o.ID, false, o.Ping)
	}
	c.Part("metainfo", t.metainfos.run)
	c.Part("sweep", t.sweep)
	c.Part("confirm", t.confirming)
	return c.Serve("tracker", t.handler(c.Registry), t.adminRoutes)
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

// sweepGap lies before a sweep that is wanted before its time, so that one serves many.
const sweepGap = 100 * time.Millisecond

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
			if !role.Pause(ctx, sweepGap) {
				return nil
			}
		}
		t.store.sweep()
	}
}
