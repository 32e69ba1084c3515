package agent

import (
	"net/http"
	"strings"
	"time"

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
		h := a.withHealth(a.cfg.DockerHub, observe(a.handler(a.cfg.DockerHub, a.namer.StandsFor("docker.io"))))
		hub, err := transport.NewServer("docker_hub", a.cfg.DockerHub, h, a.log)
		if err != nil {
			return err
		}
		a.hub = hub
		c.Undo(hub.Close)
		c.Part("docker_hub", hub.Run)
	}
	h := a.withHealth(a.cfg.Server, observe(a.handler(a.cfg.Server, a.namer)))
	if err := c.Serve("registry", h, a.store.AdminRoutes, a.store.ControlRoutes, a.swarm.ControlRoutes); err != nil {
		return err
	}
	c.Part("watchdog", newWatchdog(a.Addr(), a.cfg.Server.TLS.Cert != "", time.Duration(a.cfg.Watchdog), a.end).run)
	return nil
}

// withHealth is h with GET /health, which is not counted among the requests: the agent asks it of itself.
func (a *Agent) withHealth(cfg transport.ServerConfig, h http.Handler) http.Handler {
	health := transport.OwnHosts(cfg)(http.HandlerFunc(a.health))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/health" && (r.Method == http.MethodGet || r.Method == http.MethodHead) {
			health.ServeHTTP(w, r)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// handler is the read half of the OCI Distribution API. Lists and referrers are build-index's; what writes is refused.
func (a *Agent) handler(cfg transport.ServerConfig, namer registry.Namer) http.Handler {
	r := chi.NewRouter()
	r.Use(transport.OwnHosts(cfg), transport.CloseAfterChunked, answerHalfClosed)
	r.Get("/readiness", a.Health.Readiness)
	r.Get("/token", a.token)
	r.Post("/token", a.token)
	r.MethodNotAllowed(registry.UnknownMethod)
	front := front{a}
	r.Mount("/", a.audited(registry.Server{
		Dialect: cluster.Dialect(), Blobs: front, Manifests: front, Tags: a.index, Catalog: a.index, Referrers: a.index,
		Namer: namer, Access: a.accessOf(), Mirror: true, ReadOnly: "an agent only serves pulls; push to the proxy", Log: a.log,
	}.Handler()))
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
