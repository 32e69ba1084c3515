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
	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// Proxy is one running proxy.
type Proxy struct {
	log      *slog.Logger
	m        *metrics
	origins  *cluster.Origins
	index    *cluster.IndexClient // build-index, waiting for one that restarts
	ids      signer
	inFlight *inFlight
	replicas int
	stall    time.Duration
	chunkMin int64
	health   *transport.Health
	server   *transport.Server
	admin    *transport.Server
}

// New binds the listeners. Run serves.
func New(cfg Config, deps role.Deps) (_ *Proxy, err error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	hc, err := transport.NewClient(cfg.Client, deps.Log)
	if err != nil {
		return nil, fmt.Errorf("client: %w", err)
	}
	p := &Proxy{
		log: deps.Log, m: newMetrics(deps.Registry),
		replicas: min(cfg.Replicas, len(cfg.Origins)), stall: time.Duration(cfg.StallTimeout), chunkMin: int64(cfg.ChunkMinLength), health: transport.NewHealth(),
	}
	if p.origins, err = cluster.NewOrigins(cfg.Origins, cfg.Replicas, p.stall, hc); err != nil {
		return nil, err
	}
	if p.index, err = cluster.NewIndexClient(cfg.BuildIndex.URL, transport.Patient(hc, time.Duration(cfg.BuildIndexPatience))); err != nil {
		return nil, fmt.Errorf("build_index: %w", err)
	}
	now, err := registry.NewClient(cfg.BuildIndex.URL, hc)
	if err != nil {
		return nil, fmt.Errorf("build_index: %w", err)
	}
	key, err := uploadKey(cfg, deps.Log)
	if err != nil {
		return nil, err
	}
	p.ids, p.inFlight = signer{key}, newInFlight(cfg.Uploads.InFlight, cfg.Uploads.InFlightPerSource)
	p.health.AddCheck("build-index", true, now.Ping)
	p.health.AddCheck("origin", true, p.anyOrigin)
	for _, o := range p.origins.All() {
		p.health.AddCheck(o.ID, false, o.Ping)
	}
	if p.server, err = transport.NewServer("registry", cfg.Server, p.handler(deps.Registry), deps.Log); err != nil {
		return nil, err
	}
	if cfg.Admin.Listen != "" {
		if p.admin, err = transport.NewServer("admin", cfg.Admin, transport.AdminHandler(cfg.Admin, p.health, deps.Registry), deps.Log); err != nil {
			return nil, errors.Join(err, p.server.Close())
		}
	}
	return p, nil
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

// Addr is the address of the registry listener.
func (p *Proxy) Addr() string { return p.server.Addr() }

// AdminAddr is the address of the admin listener, empty when there is none.
func (p *Proxy) AdminAddr() string {
	if p.admin == nil {
		return ""
	}
	return p.admin.Addr()
}

// Run serves until ctx is done, then lets requests in flight finish within the server's bound.
func (p *Proxy) Run(ctx context.Context) error {
	defer p.origins.Close()
	var g role.Group
	if p.admin != nil {
		g.Add("admin", p.admin.Run)
	}
	g.Add("registry", p.server.Run)
	g.Add("readiness", func(ctx context.Context) error {
		<-ctx.Done()
		p.health.SetDraining()
		return nil
	})
	return g.Run(ctx)
}
