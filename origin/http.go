package origin

import (
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

func (o *Origin) handler(reg *prometheus.Registry) (http.Handler, error) {
	extension, err := o.extension()
	if err != nil {
		return nil, err
	}
	r := chi.NewRouter()
	r.Use(transport.Middleware("origin", o.log, reg), withAsker, cluster.CarryAuthorization)
	r.Get("/health", o.Health.Health)
	r.Get("/readiness", o.Health.Readiness)
	r.MethodNotAllowed(registry.UnknownMethod)
	isProxy := func(r *http.Request) bool { return cluster.MayBe(r, transport.RoleProxy) }
	r.Mount("/", registry.Server{Dialect: cluster.Dialect(), Blobs: counting{o}, BlobDeleter: o, Uploads: o, Extension: extension, TrustSource: isProxy, Log: o.log}.Handler())
	return r, nil
}

func (o *Origin) adminRoutes(m *http.ServeMux) {
	o.store.AdminRoutes(m)
	m.HandleFunc("GET /writeback", func(w http.ResponseWriter, _ *http.Request) {
		transport.ServeJSON(w, http.StatusOK, o.status())
	})
}
