package buildindex

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

func (x *Index) handler(reg *prometheus.Registry) (http.Handler, error) {
	extension, err := x.extension()
	if err != nil {
		return nil, err
	}
	r := chi.NewRouter()
	r.Use(transport.Middleware("build-index", x.log, reg), transport.AnswerHalfClosed, cluster.CarryAuthorization)
	r.Get("/health", x.Health.Health)
	r.Get("/readiness", x.Health.Readiness)
	r.MethodNotAllowed(registry.UnknownMethod)
	r.Mount("/", x.whenBegun(registry.Server{
		Dialect: dialect(), Manifests: x, ManifestWriter: x, Tags: x, Catalog: x, Referrers: x, Extension: extension, Log: x.log,
	}.Handler()))
	return r, nil
}

// dialect is that of all roles, and says in a 503 whether it is the build-index that is away.
func dialect() registry.Dialect {
	d := cluster.Dialect()
	d.Away = cluster.AwayHeader
	return d
}

func (x *Index) adminRoutes(m *http.ServeMux) {
	m.HandleFunc("GET /writeback", func(w http.ResponseWriter, r *http.Request) {
		s, err := x.status(r.Context())
		if err != nil {
			registry.WriteError(w, r, err)
			return
		}
		transport.ServeJSON(w, http.StatusOK, s)
	})
}

// status is what the bucket still lacks.
func (x *Index) status(ctx context.Context) (s cluster.WritebackStatus, err error) {
	if !x.opened.Load() {
		return s, x.checkTenure(ctx)
	}
	state, err := x.db.State(ctx)
	if err != nil {
		return s, err
	}
	s.Pending = state.OutboxRows
	if !x.restored.Load() {
		s.Names++ // what is not restored may still have to be written
	}
	var errs []error
	for _, l := range x.lanes {
		errs = append(errs, l.check(ctx))
		if l.name != "" {
			s.Buckets = append(s.Buckets, l.status())
		}
	}
	if err := errors.Join(errs...); err != nil {
		s.Error = err.Error()
	}
	s.SetAside, s.SetAsideCount = x.aside.list(cluster.MaxSetAside)
	return s, nil
}

var errBody = &registry.Error{Code: "UNSUPPORTED", Status: http.StatusBadRequest, Message: "body is not understood"}

// extension returns what serves memberships, and what is about no repository (proto/README.md, section 5).
func (x *Index) extension() (cluster.Serve, error) {
	about := cluster.AboutBlob
	return cluster.ServeExtension(transport.RoleBuildIndex, []cluster.Route{
		{Methods: "HEAD GET", Path: "/v2/<name>/_kraken/layers", Serve: x.serveLayers},
		{Methods: "PUT", Path: "/v2/<name>/_kraken/layers", Serve: about(x.servePutLayer)},
		{Methods: "DELETE", Path: "/v2/<name>/_kraken/layers", Serve: about(x.serveDeleteLayer)},
		{Methods: "POST", Path: "/v2/<name>/_kraken/mount", Serve: about(x.serveMount)},
		{Methods: "POST", Path: "/v2/<name>/_kraken/members", Serve: x.members},
		{Methods: "GET", Path: "/v2/<name>/_kraken/grant", Serve: about(x.serveGrant)},
		{Methods: "GET", Path: "/v2/_kraken/upstreams", Serve: x.serveUpstreams},
		{Methods: "GET", Path: "/v2/_kraken/repositories", Serve: x.listHolders},
		{Methods: "GET", Path: "/v2/_kraken/access", Serve: x.serveAccess},
		{Methods: "PUT", Path: "/v2/_kraken/tokenkeys", Serve: x.putTokenKey},
		{Methods: "PUT", Path: "/v2/_kraken/robots", Serve: x.putRobot},
		{Methods: "DELETE", Path: "/v2/_kraken/robots", Serve: x.deleteRobot},
	})
}

// serveLayers answers with one membership, or without a key with a page of them.
func (x *Index) serveLayers(w http.ResponseWriter, r *http.Request, p registry.ExtensionPath) error {
	if p.Key == "" {
		return x.listLayers(w, r, p.Repository)
	}
	return cluster.AboutBlob(func(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error {
		l, err := x.getLayer(r.Context(), repo, d)
		if err != nil {
			return err
		}
		return transport.WriteJSON(w, http.StatusOK, l)
	})(w, r, p)
}

func (x *Index) servePutLayer(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error {
	var l cluster.Layer
	b, err := io.ReadAll(io.LimitReader(r.Body, 4<<10))
	if err == nil {
		err = json.Unmarshal(b, &l)
	}
	if err != nil || l.Digest != d || l.Size < 0 {
		return fmt.Errorf("%w: want the layer %s with its size", errBody, d)
	}
	if err := x.putLayer(r.Context(), repo, l); err != nil {
		return err
	}
	w.WriteHeader(http.StatusCreated)
	return nil
}

func (x *Index) serveDeleteLayer(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error {
	if err := x.deleteLayer(r.Context(), repo, d); err != nil {
		return err
	}
	w.WriteHeader(http.StatusAccepted)
	return nil
}

func (x *Index) serveGrant(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error {
	if err := x.mirror.granted(r.Context(), repo, d); err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

func (x *Index) serveMount(w http.ResponseWriter, r *http.Request, repo string, d digest.Digest) error {
	l, err := x.mount(r.Context(), repo, r.URL.Query().Get("from"), d)
	if err != nil {
		return err
	}
	return transport.WriteJSON(w, http.StatusCreated, l)
}
