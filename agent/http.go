package agent

import (
	"net/http"
	"strings"

	"github.com/go-chi/chi/v5"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/role"
	"kraken/proto/transport"
)

// listen binds the listeners for runtimes, and the admin listener.
func (a *Agent) listen(c *role.Chassis) error {
	observe := transport.Middleware("agent", a.log, c.Registry)
	if a.cfg.DockerHub.Listen != "" {
		h := observe(a.handler(a.cfg.DockerHub, a.namer.StandsFor("docker.io")))
		hub, err := transport.NewServer("docker_hub", a.cfg.DockerHub, h, a.log)
		if err != nil {
			return err
		}
		a.hub = hub
		c.Undo(hub.Close)
		c.Part("docker_hub", hub.Run)
	}
	h := observe(a.handler(a.cfg.Server, a.namer))
	return c.Serve("registry", h, a.store.AdminRoutes, a.store.ControlRoutes, a.swarm.ControlRoutes)
}

// handler is the read half of the OCI Distribution API. Lists and referrers are build-index's; what writes is refused.
func (a *Agent) handler(cfg transport.ServerConfig, namer registry.Namer) http.Handler {
	r := chi.NewRouter()
	r.Use(transport.OwnHosts(cfg), transport.CloseAfterChunked, answerHalfClosed)
	r.Get("/health", a.Health.Health)
	r.Get("/readiness", a.Health.Readiness)
	r.MethodNotAllowed(registry.UnknownMethod)
	front := front{a}
	r.Mount("/", registry.Server{
		Dialect: cluster.Dialect(), Blobs: front, Manifests: front, Tags: a.index, Catalog: a.index, Referrers: a.index,
		Namer: namer, Mirror: true, ReadOnly: "an agent only serves pulls; push to the proxy", Log: a.log,
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
