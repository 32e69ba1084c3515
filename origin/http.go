package origin

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/go-chi/chi/v5"
	"github.com/opencontainers/go-digest"
	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/blob"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

func (o *Origin) handler(reg *prometheus.Registry) http.Handler {
	r := chi.NewRouter()
	r.Use(transport.Middleware("origin", o.log, reg), withAsker)
	r.Get("/health", o.health.Health)
	r.Get("/readiness", o.health.Readiness)
	r.MethodNotAllowed(registry.UnknownMethod)
	isProxy := func(r *http.Request) bool { return mayBe(r, o.cfg.ProxyNames) }
	r.Mount("/", registry.Server{Blobs: counting{o}, BlobDeleter: o, Uploads: o, Extension: o.extension, TrustSource: isProxy, Log: o.log}.Handler())
	return r
}

func (o *Origin) adminHandler(reg *prometheus.Registry) http.Handler {
	m := transport.AdminHandler(o.cfg.Admin, o.health, reg, o.store.ControlRoutes, o.swarm.ControlRoutes)
	o.store.AdminRoutes(m)
	m.HandleFunc("GET /writeback", func(w http.ResponseWriter, _ *http.Request) {
		if err := answer(w, http.StatusOK, o.status()); err != nil {
			o.log.Debug("client went away", "error", err)
		}
	})
	return m
}

// counting tells the leases which ranges are read, and keeps their reading to the upload rates.
type counting struct{ *Origin }

// OpenBlob implements registry.Blobs.
func (c counting) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	content, err := c.Origin.OpenBlob(ctx, repo, d, hint)
	if err == nil {
		if n := c.leases.sending(d, hint, content.Size); n > 0 {
			who, _ := ctx.Value(askerKey{}).(asker)
			pl := blob.PieceLength(content.Size)
			read := c.budgets.reading(who, d, int(hint.Offset/pl), int((hint.Offset+n-1)/pl))
			sent, closed := c.turns.fetch(n), content.Close
			content.Close = func() error {
				limit, stop := context.WithTimeout(ctx, leaseFor)
				transport.AwaitSent(limit, turnLimit)
				stop()
				sent()
				at, err := content.Body.Seek(0, io.SeekCurrent)
				read(err == nil && at >= hint.Offset+n)
				return closed()
			}
		}
		content.Body = c.swarm.LimitUpload(ctx, d, content.Body)
	}
	return content, err
}

func answer(w http.ResponseWriter, status int, v any) error {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	return json.NewEncoder(w).Encode(v)
}

// decode reads a bounded JSON body.
func decode(r *http.Request, limit int64, into any) error {
	b, err := readBody(r, limit)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, into); err != nil {
		return fmt.Errorf("%w: body: %w", errBody, err)
	}
	return nil
}

func readBody(r *http.Request, limit int64) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r.Body, limit+1))
	if err == nil && int64(len(b)) > limit {
		err = fmt.Errorf("more than %d bytes", limit)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: body: %w", errBody, err)
	}
	return b, nil
}

var errBody = &registry.Error{Code: "UNSUPPORTED", Status: http.StatusBadRequest, Message: "body is not understood"}

// extension serves what origins offer beside the specification (proto/README.md, section 5).
func (o *Origin) extension(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
	switch x.Resource {
	case "names":
		return o.names(w, r, x)
	case "pending":
		return o.pending(w, r)
	case "durable":
		return o.durableRoute(w, r, x)
	}
	d, err := blob.ParseDigest(x.Key)
	if err != nil {
		return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
	}
	if err := registry.CheckName(x.Repository); err != nil {
		return err
	}
	switch r.Method + " " + x.Resource {
	case "HEAD blobs":
		i, err := o.store.Stat(d)
		if err != nil {
			return wire(err)
		}
		w.Header().Set("Content-Length", strconv.FormatInt(i.Size, 10))
		w.Header().Set("Docker-Content-Digest", d.String())
		w.WriteHeader(http.StatusOK)
		return nil
	case "GET blobs":
		c, err := o.local(d)
		if err != nil {
			return err
		}
		return registry.ServeContent(w, r, c)
	case "PUT blobs":
		fresh, err := o.replicate(r.Context(), x.Repository, d, r.ContentLength, isTrue(r.Header.Get("Kraken-Writeback")), r.Body)
		if err != nil {
			return err
		}
		if fresh {
			w.WriteHeader(http.StatusCreated)
		}
		return nil
	case "GET metainfo":
		ctx, cancel := context.WithTimeout(r.Context(), time.Second)
		defer cancel()
		m, err := o.findMetainfo(ctx, x.Repository, d)
		if err != nil {
			return err
		}
		b := m.Marshal()
		w.Header().Set("Content-Type", "application/x-bittorrent")
		w.Header().Set("Content-Length", strconv.Itoa(len(b)))
		_, err = w.Write(b)
		return ignoreWrite(err)
	case "DELETE metainfo":
		if err := o.doubtMetainfo(d, registry.SourceOf(r.RemoteAddr)); err != nil {
			return err
		}
		w.WriteHeader(http.StatusAccepted)
		return nil
	case "POST lease":
		return o.leaseRoute(w, r, d)
	}
	return fmt.Errorf("%w: %s %s", registry.ErrUnsupported, r.Method, x.Resource)
}

// ignoreWrite: a response that can't be written any more has no one to be told.
func ignoreWrite(error) error { return nil }

func (o *Origin) leaseRoute(w http.ResponseWriter, r *http.Request, d digest.Digest) error {
	var q registry.LeaseRequest
	if err := decode(r, blob.MaxMetainfo/16, &q); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), time.Second)
	defer cancel()
	m, err := o.metainfo(ctx, d)
	if err != nil {
		return err
	}
	have, err := blob.ParseBitmap(m.NumPieces(), q.Have)
	if err != nil {
		return fmt.Errorf("%w: have: %w", errBody, err)
	}
	if len(q.Peer) > maxPeer {
		return fmt.Errorf("%w: peer %.50q: want 40 hex digits", errBody, q.Peer)
	}
	if q.Max < 1 || q.Max > registry.MaxLeasePieces || len(q.Want) > 10*registry.MaxLeasePieces {
		return fmt.Errorf("%w: max is %d, want names %d pieces", errBody, q.Max, len(q.Want))
	}
	out, err := o.lease(r.Context(), m, have, asker{sourceOf(r), q.Peer}, q)
	if err != nil {
		return err
	}
	o.m.leased.Add(float64(len(out.Pieces)))
	return ignoreWrite(answer(w, http.StatusOK, out))
}

// lease hands out pieces when the turn of who asks has come, as far as its budget allows.
func (o *Origin) lease(ctx context.Context, m *blob.Metainfo, have blob.Bitmap, who asker, q registry.LeaseRequest) (registry.LeaseResponse, error) {
	most, doubtful, refused, leave := o.budgets.enter(who, q.Max)
	if most == 0 { // the answer waits here, so that who asks again at once costs little
		select {
		case <-time.After(budgetWait):
		case <-ctx.Done():
		}
		return registry.LeaseResponse{RetryAfter: soon, HeldBack: refused}, nil
	}
	defer leave()
	if !o.leases.enter(m) {
		return registry.LeaseResponse{}, &registry.RetryError{Err: fmt.Errorf("%w: %s is leased to many agents now", registry.ErrTooManyRequests, m.Digest), After: time.Second}
	}
	defer o.leases.leave(m.Digest)
	take := o.turns.take
	if doubtful {
		take = o.turns.takeLast
	}
	if q.Max = take(ctx, who.share(), m.PieceLength(), most); q.Max == 0 {
		return registry.LeaseResponse{RetryAfter: soon}, nil
	}
	ring := o.origins.Ring()
	replica := max(0, slices.Index(ring.Owners(m.Digest), o.cfg.ID))
	hand := o.leases.hand
	if doubtful {
		hand = o.leases.handAside
	}
	out := hand(m, have, q, replica, ring.Replicas())
	o.turns.unused(who.share(), int64(q.Max-len(out.Pieces))*m.PieceLength())
	o.budgets.lend(who, m.Digest, out.Pieces)
	return out, nil
}

// budgetWait is how long who has leased as much as it may waits for being told so.
const budgetWait = 100 * time.Millisecond

func (o *Origin) durableRoute(w http.ResponseWriter, r *http.Request, x registry.ExtensionPath) error {
	if r.Method != http.MethodPost {
		return fmt.Errorf("%w: %s durable", registry.ErrUnsupported, r.Method)
	}
	var q registry.DurableRequest
	if err := decode(r, registry.MaxDurableDigests*160, &q); err != nil {
		return err
	}
	if len(q.Digests) > registry.MaxDurableDigests {
		return fmt.Errorf("%w: %d digests, at most %d", errBody, len(q.Digests), registry.MaxDurableDigests)
	}
	for _, d := range q.Digests {
		if _, err := blob.ParseDigest(d.String()); err != nil {
			return fmt.Errorf("%w: %w", registry.ErrDigestInvalid, err)
		}
	}
	out, err := o.durableIn(r.Context(), x.Repository, q.Digests)
	if err != nil {
		return err
	}
	return ignoreWrite(answer(w, http.StatusOK, out))
}

func (o *Origin) pending(w http.ResponseWriter, r *http.Request) error {
	if r.Method != http.MethodGet {
		return fmt.Errorf("%w: %s pending", registry.ErrUnsupported, r.Method)
	}
	if o.store.Scanning() { // part of the list would be taken for all of it
		return &registry.RetryError{Err: fmt.Errorf("%w: the store is being scanned", registry.ErrUnavailable), After: time.Second}
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	for _, d := range o.store.Marked() {
		m, err := o.store.Marker(d)
		if err != nil {
			continue // settled meanwhile
		}
		i, err := o.store.Stat(d)
		if err != nil {
			continue
		}
		if err := enc.Encode(registry.PendingBlob{Digest: d, Size: i.Size, Repositories: m.Repositories, Since: m.Created}); err != nil {
			return ignoreWrite(err)
		}
	}
	return nil
}
