package proxy

import (
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
	"kraken/proxy/login"
)

// handler stacks: a server over clients is a proxy. Names are build-index's whole half, blobs go by membership.
func (p *Proxy) handler(reg *prometheus.Registry) http.Handler {
	r := chi.NewRouter()
	r.Use(transport.Middleware("proxy", p.log, reg), transport.CloseAfterChunked, transport.AnswerHalfClosed, withSource)
	r.Get("/health", p.Health.Health)
	r.Get("/readiness", p.Health.Readiness)
	r.MethodNotAllowed(registry.UnknownMethod)
	s := registry.Server{
		Dialect: cluster.Dialect(), Blobs: p, BlobDeleter: p, Uploads: p, Mounter: p,
		Manifests: p.index, ManifestWriter: p.index, Tags: p.index, Catalog: p.index, Referrers: p.index,
		ChunkMinLength: p.chunkMin, Namer: p.namer, Mirror: true, Log: p.log,
	}
	if p.door == nil {
		r.Mount("/", p.inFlight.uploads(p.m, s.Handler()))
		return r
	}
	s.Access = p.door
	r.Get(login.TokenPath, p.door.ServeToken)
	r.Post(login.TokenPath, p.door.ServeToken)
	r.Get(login.JWKSPath, p.door.ServeJWKS)
	r.Mount("/", p.inFlight.uploads(p.m, p.door.Audited(s.Handler())))
	return r
}
