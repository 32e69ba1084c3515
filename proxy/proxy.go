// Package proxy is the front door for people and CI: a full OCI registry, push, pull, discovery and management. It is
// stateless: blobs go to origins, each chunk to two of them in one pass; manifests, tags and memberships to
// build-index. It has no disk and buffers no body, and any number of proxies can stand side by side.
package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"kraken/proto/cluster"
	"kraken/proto/role"
	"kraken/proto/transport"
	"kraken/proxy/login"
)

// Proxy is one running proxy.
type Proxy struct {
	*role.Chassis
	log      *slog.Logger
	m        *metrics
	origins  *cluster.Origins
	index    *cluster.IndexClient // waits for a build-index that restarts
	namer    *cluster.Namer       // which repository a client means
	ids      signer
	door     *login.Door // nil: everybody may do everything
	inFlight *inFlight
	doubts   *doubts
	replicas int
	stall    time.Duration
	chunkMin int64

	originPatience time.Duration
}

// New binds the listeners. Run serves.
func New(cfg Config, deps role.Deps) (*Proxy, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	p := &Proxy{
		log: deps.Log, m: newMetrics(deps.Registry), replicas: min(cfg.Replicas, len(cfg.Origins)), stall: time.Duration(cfg.StallTimeout),
		chunkMin: int64(cfg.ChunkMinLength), originPatience: time.Duration(cfg.OriginPatience), namer: cluster.NewNamer(cfg.Names), inFlight: newInFlight(cfg.Uploads.InFlight, cfg.Uploads.InFlightPerSource), doubts: newDoubts(),
	}
	if err := role.Open(cfg.Config, deps, p.stall, func(c *role.Chassis) error { return p.assemble(c, cfg) }); err != nil {
		return nil, err
	}
	return p, nil
}

// assemble puts the proxy on its chassis.
func (p *Proxy) assemble(c *role.Chassis, cfg Config) (err error) {
	p.Chassis, p.origins = c, c.Origins
	if p.index, err = cluster.NewIndexClient(cfg.BuildIndex.URL, transport.Patient(c.Client, time.Duration(cfg.BuildIndexPatience), cluster.IsAway)); err != nil {
		return fmt.Errorf("build_index: %w", err)
	}
	now, err := cluster.NewIndexClient(cfg.BuildIndex.URL, c.Client)
	if err != nil {
		return fmt.Errorf("build_index: %w", err)
	}
	var usable func() error
	if p.ids.keys, usable, err = uploadKeys(cfg, p.log); err != nil {
		return err
	}
	c.Health.AddCheck("build-index", true, now.Ping)
	c.Health.AddCheck("origin", true, p.anyOrigin)
	c.Health.AddCheck("upload key", false, func(context.Context) error { return usable() })
	for _, o := range p.origins.All() {
		c.Health.AddCheck(o.ID, false, o.Ping)
	}
	c.Part("background", c.EndBackground)
	c.Part("upstreams", func(ctx context.Context) error { return p.namer.Watch(ctx, now, p.log, nil, nil) })
	if err := p.openDoor(c, cfg, now); err != nil {
		return err
	}
	return c.Serve("registry", p.handler(c.Registry), nil)
}

// openDoor makes what decides who may come in, where that is configured.
func (p *Proxy) openDoor(c *role.Chassis, cfg Config, index *cluster.IndexClient) (err error) {
	if !cfg.Access.Enabled() {
		return nil
	}
	if p.door, err = login.Open(cfg.Access, index, p.log, c.Registry); err != nil {
		return err
	}
	c.Closes(p.door.Close)
	c.Health.AddCheck("access", false, p.door.Check)
	c.Health.AddCheck("tokens", true, p.door.Ready)
	c.Part("keys and robots", p.door.RunState)
	c.Part("keys for tokens", p.door.RunSigner)
	return nil
}

// anyOrigin is nil as soon as one origin answers.
func (p *Proxy) anyOrigin(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all := p.origins.All()
	answers := make(chan error, len(all))
	for _, o := range all {
		go func() { answers <- o.Ping(ctx) }()
	}
	var errs []error
	for range all {
		err := <-answers
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
