package origin

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/netip"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/blob"
	"kraken/proto/role"
)

// seeder is what an origin asks of its swarm.
type seeder interface {
	Register(m *blob.Metainfo)
	Forget(d digest.Digest)
	Seeds(d digest.Digest) bool
	LimitUpload(ctx context.Context, d digest.Digest, body io.ReadSeeker) io.ReadSeeker
	ControlRoutes(m *http.ServeMux)
	Addr() netip.AddrPort
	Run(ctx context.Context) error
	Close() error
}

// openSeeder opens the swarm, or what stands in its place where the configuration turns it off.
func openSeeder(cfg Peer, st *store.Store, c *role.Chassis) (seeder, error) {
	if cfg.Off {
		return seedless{}, nil
	}
	c.WatchCertificates(cfg.TLS.Cert, cfg.TLS.CA)
	peers, err := cfg.TLS.Configs(c.AdmitPeer, c.Log)
	if err != nil {
		return nil, fmt.Errorf("peer: %w", err)
	}
	return swarm.New(swarm.Config{
		Listen: cfg.Listen, Store: st, StockPeers: cfg.StockPeers, TLS: swarm.TLS(peers),
		Rates: cfg.Rates, Logger: c.Log, Registerer: c.Registry,
	})
}

// seedless is no swarm at all.
type seedless struct{}

func (seedless) Register(*blob.Metainfo)       { /* nobody asks */ }
func (seedless) Forget(digest.Digest)          { /* nothing is known */ }
func (seedless) Seeds(digest.Digest) bool      { return false }
func (seedless) ControlRoutes(*http.ServeMux)  { /* there are no limits */ }
func (seedless) Addr() netip.AddrPort          { return netip.AddrPort{} }
func (seedless) Close() error                  { return nil }
func (seedless) Run(ctx context.Context) error { <-ctx.Done(); return nil }
func (seedless) LimitUpload(_ context.Context, _ digest.Digest, body io.ReadSeeker) io.ReadSeeker {
	return body
}
