package proxy

import (
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/registry"
	"kraken/proto/transport"
)

// handler stacks: a server over clients is a proxy. Names are build-index's whole half, blobs go by membership.
func (p *Proxy) handler(reg *prometheus.Registry) http.Handler {
	r := chi.NewRouter()
	r.Use(transport.Middleware("proxy", p.log, reg), transport.AnswerHalfClosed)
	r.Use(closeAfterChunked)
	r.Get("/health", p.health.Health)
	r.Get("/readiness", p.health.Readiness)
	r.MethodNotAllowed(registry.UnknownMethod)
	r.Mount("/", p.inFlight.uploads(p.m, registry.Server{
		Blobs: p, BlobDeleter: p, Uploads: p, Mounter: p,
		Manifests: p.names, ManifestWriter: p.names, Tags: p.names, Catalog: p.names, Referrers: p.names,
		ChunkMinLength: p.chunkMin, Log: p.log,
	}.Handler()))
	return r
}

// closeAfterChunked ends a connection after a request whose body came in chunks. Such a request may have had a Content-Length, too, which net/http
// drops without a trace: whoever stands in front and goes by that sees the end of the body elsewhere, and what follows would be taken for
// another request. RFC 9112 section 6.1 asks for the connection to be closed then.
func closeAfterChunked(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if len(r.TransferEncoding) > 0 {
			w.Header().Set("Connection", "close")
		}
		next.ServeHTTP(w, r)
	})
}
