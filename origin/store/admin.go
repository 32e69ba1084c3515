package store

import (
	"errors"
	"fmt"
	"net/http"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// status is the answer to GET /cache. Sizes are bytes.
type status struct {
	Used      int64           `json:"used"`
	Leaving   int64           `json:"leaving"`  // of evicted blobs that are being removed
	Capacity  int64           `json:"capacity"` // 0: unbounded
	HighWater float64         `json:"high_water"`
	LowWater  float64         `json:"low_water"`
	MinFree   int64           `json:"min_free"`
	Blobs     int             `json:"blobs"`
	Partial   int             `json:"partial"`  // that are written now
	Scanning  bool            `json:"scanning"` // some blobs that were there at the start may not be known yet
	Pins      []digest.Digest `json:"pins"`
	Rotten    int64           `json:"rotten"` // found since the start
}

func (s *Store) status() status {
	pins := s.Pins()
	s.mu.Lock()
	defer s.mu.Unlock()
	return status{
		Used: s.used, Leaving: s.leaving, Scanning: s.scan.running.Load(), Capacity: s.cfg.Capacity, HighWater: s.cfg.HighWater, LowWater: s.cfg.LowWater, MinFree: int64(s.cfg.MinFree),
		Blobs: len(s.entries), Partial: len(s.partials), Pins: pins, Rotten: s.scrub.rotten.Load(),
	}
}

// AdminRoutes adds to m:
//
//	GET /cache  what is used, and what is pinned
func (s *Store) AdminRoutes(m *http.ServeMux) {
	m.HandleFunc("GET /cache", func(w http.ResponseWriter, _ *http.Request) {
		transport.ServeJSON(w, http.StatusOK, s.status())
	})
}

// ControlRoutes adds what operators may do to m, which must be out of the reach of others:
//
//	PUT    /cache/pins/<digest>  keep a blob from being evicted, also one that is not there yet
//	DELETE /cache/pins/<digest>  end that
//	POST   /cache/scrub          verify all blobs again, from now on
func (s *Store) ControlRoutes(m *http.ServeMux) {
	m.HandleFunc("PUT /cache/pins/{digest}", pinRoute(s.Pin))
	m.HandleFunc("DELETE /cache/pins/{digest}", pinRoute(s.Unpin))
	m.HandleFunc("POST /cache/scrub", func(w http.ResponseWriter, _ *http.Request) {
		s.ScrubNow()
		w.WriteHeader(http.StatusAccepted)
	})
}

// errPinConfigured is a pin that only the configuration ends.
var errPinConfigured = &registry.Error{Code: "PIN_CONFIGURED", Status: http.StatusConflict, Message: "the configuration pins it"}

func pinRoute(change func(digest.Digest) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		d, err := blob.ParseDigest(r.PathValue("digest"))
		if err != nil {
			registry.WriteError(w, r, fmt.Errorf("%w: want sha256:<64 hex> or sha512:<128 hex>: %w", registry.ErrDigestInvalid, err))
			return
		}
		switch err := change(d); {
		case errors.Is(err, ErrConfigured):
			registry.WriteError(w, r, fmt.Errorf("%w: %w", errPinConfigured, err))
		case errors.Is(err, ErrFull):
			registry.WriteError(w, r, fmt.Errorf("%w: %w", registry.ErrStorageFull, err))
		case err != nil:
			registry.WriteError(w, r, err)
		default:
			w.WriteHeader(http.StatusNoContent)
		}
	}
}
