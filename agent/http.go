package agent

import (
	"net/http"
	"strings"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// handler is the read half of the OCI Distribution API. Lists and referrers are build-index's; what writes is refused.
func (a *Agent) handler(reg *prometheus.Registry) http.Handler {
	r := chi.NewRouter()
	r.Use(transport.Middleware("agent", a.log, reg), transport.OwnHosts(a.cfg.Server), transport.CloseAfterChunked, answerHalfClosed)
	r.Get("/health", a.Health.Health)
	r.Get("/readiness", a.Health.Readiness)
	r.MethodNotAllowed(registry.UnknownMethod)
	r.Mount("/", registry.Server{
		Dialect: cluster.Dialect(), Blobs: a, Manifests: a, Tags: a.index, Catalog: a.index, Referrers: a.index,
		Namespaces: a.cfg.Names, ReadOnly: "an agent only serves pulls; push to the proxy", Log: a.log,
	}.Handler())
	return r
}

// answerHalfClosed does so for everything but blobs: a reader of one that leaves ends what is fetched for it at once.
func answerHalfClosed(next http.Handler) http.Handler {
	patient := transport.AnswerHalfClosed(next)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.URL.Path, "/blobs/") {
			next.ServeHTTP(w, r)
			return
		}
		patient.ServeHTTP(w, r)
	})
}
