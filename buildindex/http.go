package buildindex

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"

	"github.com/go-chi/chi/v5"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

func (x *Index) handler(reg *prometheus.Registry) http.Handler {
	r := chi.NewRouter()
	r.Use(transport.Middleware("build-index", x.log, reg), transport.AnswerHalfClosed, cluster.CarryAuthorization)
	r.Get("/health", x.Health.Health)
	r.Get("/readiness", x.Health.Readiness)
	r.MethodNotAllowed(registry.UnknownMethod)
	r.Mount("/", x.whenBegun(registry.Server{
		Dialect: cluster.Dialect(), Manifests: x, ManifestWriter: x, Tags: x, Catalog: x, Referrers: x, Extension: x.extension, Log: x.log,
	}.Handler()))
	return r
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

// extension serves memberships (proto/README.md, section 5).
func (x *Index) extension(w http.ResponseWriter, r *http.Request, p registry.ExtensionPath) error {
	if done, err := x.serveMirror(w, r, p); done || err != nil {
		return err
	}
	switch {
	case p.Repository == "":
		return x.shared(w, r, p)
	case p.Key == "" && p.Resource == "layers" && r.Method == http.MethodGet:
		return x.listLayers(w, r, p.Repository)
	case p.Key == "" && p.Resource == "members" && r.Method == http.MethodPost:
		return x.members(w, r, p.Repository)
	}
	d, err := blob.ParseDigest(p.Key)
	if err != nil {
		return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
	}
	if err := registry.CheckName(p.Repository); err != nil {
		return err
	}
	ctx := r.Context()
	switch r.Method + " " + p.Resource {
	case "PUT layers":
		var l cluster.Layer
		b, err := io.ReadAll(io.LimitReader(r.Body, 4<<10))
		if err == nil {
			err = json.Unmarshal(b, &l)
		}
		if err != nil || l.Digest != d || l.Size < 0 {
			return fmt.Errorf("%w: want the layer %s with its size", errBody, d)
		}
		if err := x.putLayer(ctx, p.Repository, l); err != nil {
			return err
		}
		w.WriteHeader(http.StatusCreated)
		return nil
	case "GET layers", "HEAD layers":
		l, err := x.getLayer(ctx, p.Repository, d)
		if err != nil {
			return err
		}
		return transport.WriteJSON(w, http.StatusOK, l)
	case "DELETE layers":
		if err := x.deleteLayer(ctx, p.Repository, d); err != nil {
			return err
		}
		w.WriteHeader(http.StatusAccepted)
		return nil
	case "GET grant", "HEAD grant":
		if err := x.mirror.granted(ctx, p.Repository, d); err != nil {
			return err
		}
		w.WriteHeader(http.StatusNoContent)
		return nil
	case "POST mount":
		l, err := x.mount(ctx, p.Repository, r.URL.Query().Get("from"), d)
		if err != nil {
			return err
		}
		return transport.WriteJSON(w, http.StatusCreated, l)
	}
	return fmt.Errorf("%w: %s %s", registry.ErrUnsupported, r.Method, p.Resource)
}
