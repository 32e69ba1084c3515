package tracker

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/go-chi/chi/v5/middleware"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
	"kraken/tracker/dashboard"
)

// Kinds of errors that only a tracker has.
var (
	errAnnounce = &registry.Error{Code: "ANNOUNCE_INVALID", Status: http.StatusBadRequest, Message: "announce invalid"}
	errVersion  = &registry.Error{Code: "UNSUPPORTED", Status: http.StatusBadRequest, Message: "announce of an unknown version"}
	errTooLarge = &registry.Error{Code: "SIZE_INVALID", Status: http.StatusRequestEntityTooLarge, Message: "announce too large"}
	errNotFound = &registry.Error{Code: "NOT_FOUND", Status: http.StatusNotFound, Message: "not found"}
)

// torrentBudget is how long the request for a .torrent waits for the metainfo.
const torrentBudget = 5 * time.Second

func (t *Tracker) handler(reg *prometheus.Registry) http.Handler {
	r := chi.NewRouter()
	r.Use(transport.Middleware("tracker", t.log, reg), middleware.GetHead)
	r.Get("/health", t.Health.Health)
	r.Get("/readiness", t.Health.Readiness)
	r.Get("/announce", t.serveStock)
	r.Post("/announce", t.answering(t.serveBatched))
	r.Get("/blobs/{digest}/torrent", t.answering(t.serveTorrent))
	page := r.With(transport.OwnHosts(t.cfg.Server))
	page.Get("/", t.answering(t.servePage))
	page.Get("/swarms", t.answering(t.serveSwarms))
	r.NotFound(t.answering(func(_ http.ResponseWriter, r *http.Request) error {
		return fmt.Errorf("%w: no such path %.200q", errNotFound, r.URL.Path)
	}))
	r.MethodNotAllowed(t.answering(func(_ http.ResponseWriter, r *http.Request) error {
		return fmt.Errorf("%w: %s %.200q", registry.ErrUnsupported, r.Method, r.URL.Path)
	}))
	return r
}

// adminRoutes are the page for operators and its JSON once more, for who has no certificate for the main listener, or
// the page's user no browser that shows it.
func (t *Tracker) adminRoutes(m *http.ServeMux) {
	m.HandleFunc("GET /{$}", t.answering(t.servePage))
	m.HandleFunc("GET /swarms", t.answering(t.serveSwarms))
}

// answering turns an error into the specification's JSON, and logs what is the server's.
func (t *Tracker) answering(h func(http.ResponseWriter, *http.Request) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if err := h(w, r); err != nil {
			if kind := new(registry.Error); !errors.As(err, &kind) || kind.Status >= http.StatusInternalServerError {
				t.log.Warn("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
			}
			registry.WriteError(w, r, err)
		}
	}
}

func send(w http.ResponseWriter, contentType string, body []byte) {
	h := w.Header()
	h.Set("Content-Type", contentType)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	h.Set("Cache-Control", "no-store")
	w.Write(body) // an error here is a client that went away
}

func sendJSON(w http.ResponseWriter, v any) error {
	w.Header().Set("Cache-Control", "no-store")
	return transport.WriteJSON(w, http.StatusOK, v)
}

// serveStock is GET /announce. Failures have status 200: clients read "failure reason" from nothing else.
func (t *Tracker) serveStock(w http.ResponseWriter, r *http.Request) {
	const contentType = "text/plain" // BEP 3: a text/plain document of a bencoded dictionary
	if !t.cfg.StockPeers {
		send(w, contentType, announce.Failure("this cluster takes no stock clients (stock_peers is off)"))
		return
	}
	q, err := announce.ParseQuery(r.URL.RawQuery)
	if err != nil {
		send(w, contentType, announce.Failure(transport.Public(err)))
		return
	}
	c, err := callerOf(r)
	if err != nil {
		send(w, contentType, announce.Failure(err.Error()))
		return
	}
	reply, err := t.stock(r.Context(), c, q)
	switch {
	case err != nil:
		send(w, contentType, announce.Failure(transport.Public(err)))
	case q.Compact:
		send(w, contentType, reply.Compact())
	default:
		send(w, contentType, reply.Dictionaries())
	}
}

// bodies are used again: a body would be a third of the garbage of an announce.
var bodies = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// serveBatched is POST /announce.
func (t *Tracker) serveBatched(w http.ResponseWriter, r *http.Request) error {
	body := bodies.Get().(*bytes.Buffer)
	defer func() {
		body.Reset()
		bodies.Put(body)
	}()
	if _, err := body.ReadFrom(http.MaxBytesReader(w, r.Body, announce.MaxBody)); err != nil {
		if _, tooLong := errors.AsType[*http.MaxBytesError](err); tooLong {
			return fmt.Errorf("%w: at most %d bytes are allowed", errTooLarge, announce.MaxBody)
		}
		return fmt.Errorf("%w: read it: %w", errAnnounce, err)
	}
	req, err := announce.ParseRequest(body.Bytes()) // which keeps nothing of it
	if err != nil {
		return kind(err)
	}
	c, err := callerOf(r)
	if err != nil {
		return fmt.Errorf("%w: %w", errAnnounce, err)
	}
	resp, err := t.batched(r.Context(), c, &req)
	if err != nil {
		return kind(err)
	}
	return sendJSON(w, resp)
}

// mapped is an error of a message with the kind that decides its status.
type mapped struct {
	error
	kind *registry.Error
}

// Unwrap gives both.
func (m mapped) Unwrap() []error { return []error{m.error, m.kind} }

func kind(err error) error {
	switch {
	case errors.Is(err, announce.ErrTooLarge):
		return mapped{err, errTooLarge}
	case errors.Is(err, announce.ErrVersion):
		return mapped{err, errVersion}
	case errors.Is(err, announce.ErrInvalid):
		return mapped{err, errAnnounce}
	}
	return err
}

// serveTorrent is GET /blobs/<digest>/torrent.
func (t *Tracker) serveTorrent(w http.ResponseWriter, r *http.Request) error {
	if !t.cfg.StockPeers {
		return fmt.Errorf("%w: this cluster gives out no .torrent files (stock_peers is off)", errNotFound)
	}
	text, err := url.PathUnescape(chi.URLParam(r, "digest")) // some clients escape the colon
	if err != nil {
		return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
	}
	d, err := blob.ParseDigest(text)
	if err != nil {
		return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
	}
	ctx, cancel := context.WithTimeout(r.Context(), torrentBudget)
	defer cancel()
	c, err := callerOf(r)
	if err != nil {
		return fmt.Errorf("%w: %w", errAnnounce, err)
	}
	i, err := t.metainfos.get(ctx, question{cluster.AnyRepository, d}, c.source)
	if err != nil {
		return err
	}
	if i.size == 0 {
		return fmt.Errorf("%w: %s is empty, there is nothing to swarm", errNotFound, d)
	}
	m, err := blob.ParseMetainfo(i.encoded)
	if err != nil {
		return fmt.Errorf("%w: metainfo of %s: %w", registry.ErrInternal, d, err)
	}
	var seeds []string
	for _, o := range t.origins.Owners(d) {
		seeds = append(seeds, o.URL+"/v2/"+cluster.AnyRepository+"/blobs/"+d.String())
	}
	w.Header().Set("Content-Disposition", `attachment; filename="`+d.Encoded()+`.torrent"`)
	send(w, "application/x-bittorrent", m.Torrent(t.announceURL(r), seeds))
	return nil
}

// announceURL is where a stock client announces: the advertised address, or the one that this request came to.
func (t *Tracker) announceURL(r *http.Request) string {
	if t.cfg.Server.Advertise != "" || r.Host == "" {
		return t.URL() + "/announce"
	}
	scheme := "http://"
	if r.TLS != nil {
		scheme = "https://"
	}
	return scheme + r.Host + "/announce"
}

// servePage is GET /.
func (t *Tracker) servePage(w http.ResponseWriter, r *http.Request) error {
	body, err := dashboard.Render(t.snapshot(pageOf(r)))
	if err != nil {
		return fmt.Errorf("%w: %w", registry.ErrInternal, err)
	}
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'")
	send(w, "text/html; charset=utf-8", body)
	return nil
}

// serveSwarms is GET /swarms.
func (t *Tracker) serveSwarms(w http.ResponseWriter, r *http.Request) error {
	return sendJSON(w, t.snapshot(pageOf(r)))
}

// pageOf is the page that is asked for, the first where none is, or no number.
func pageOf(r *http.Request) int {
	n, err := strconv.Atoi(r.URL.Query().Get("page"))
	if err != nil {
		return 1
	}
	return n
}
