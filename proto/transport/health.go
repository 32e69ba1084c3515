package transport

import (
	"context"
	"errors"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

const (
	checkTimeout = 2 * time.Second
	checkFresh   = time.Second
)

// Health answers GET /health (the process is alive) and GET /readiness (it can do its work). Readiness must not
// cascade: only what the role can't do without is required, the rest is listed as degraded.
type Health struct {
	mu       sync.Mutex
	checks   []check
	draining bool
	at       time.Time
	last     readiness // as operators see it
	public   readiness // as everybody sees it: without addresses
	ok       bool
	running  chan struct{} // closed when the round under way is over
}

type check struct {
	name     string
	required bool
	fn       func(context.Context) error
	running  *atomic.Bool // a check that hangs is not asked twice
}

type readiness struct {
	Status   string    `json:"status"`
	Failed   []failure `json:"failed,omitempty"`
	Degraded []failure `json:"degraded,omitempty"`
}

type failure struct {
	Name  string `json:"name"`
	Error string `json:"error"`
}

// NewHealth is ready as long as no check says otherwise.
func NewHealth() *Health { return &Health{} }

// AddCheck adds what readiness asks. Not after serving has begun.
func (h *Health) AddCheck(name string, required bool, fn func(context.Context) error) {
	h.checks = append(h.checks, check{name, required, fn, new(atomic.Bool)})
}

// SetDraining turns readiness false for good.
func (h *Health) SetDraining() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.draining = true
}

// Health handles GET /health.
func (h *Health) Health(w http.ResponseWriter, _ *http.Request) {
	answer(w, http.StatusOK, readiness{Status: "ok"})
}

// Readiness handles GET /readiness where clients may ask: what it says names no address. Checks run together, at most
// once a second whoever asks.
func (h *Health) Readiness(w http.ResponseWriter, r *http.Request) {
	h.readiness(w, r, func() readiness { return h.public })
}

// readinessInFull is Readiness for operators.
func (h *Health) readinessInFull(w http.ResponseWriter, r *http.Request) {
	h.readiness(w, r, func() readiness { return h.last })
}

// readiness answers with what show returns after a round; show is called with mu held.
func (h *Health) readiness(w http.ResponseWriter, r *http.Request, show func() readiness) {
	for {
		h.mu.Lock()
		if h.draining {
			h.mu.Unlock()
			answer(w, http.StatusServiceUnavailable, readiness{Status: "draining"})
			return
		}
		if !h.at.IsZero() && time.Since(h.at) < checkFresh {
			last, ok := show(), h.ok
			h.mu.Unlock()
			status := http.StatusOK
			if !ok {
				status = http.StatusServiceUnavailable
			}
			answer(w, status, last)
			return
		}
		wait := h.running
		if wait == nil {
			h.running = make(chan struct{})
			h.mu.Unlock()
			h.round(context.WithoutCancel(r.Context()))
			continue
		}
		h.mu.Unlock()
		select {
		case <-wait:
		case <-r.Context().Done():
			return
		}
	}
}

func (h *Health) round(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	errs := h.ask(ctx)
	out := h.summary(errs, error.Error)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.last, h.public, h.ok, h.at = out, h.summary(errs, Public), len(out.Failed) == 0, time.Now()
	close(h.running)
	h.running = nil
}

// summary says which checks failed, and why in the words of say.
func (h *Health) summary(errs []error, say func(error) string) readiness {
	out := readiness{Status: "ready"}
	for i, c := range h.checks {
		switch {
		case errs[i] == nil:
		case c.required:
			out.Status = "not ready"
			out.Failed = append(out.Failed, failure{c.name, say(errs[i])})
		default:
			out.Degraded = append(out.Degraded, failure{c.name, say(errs[i])})
		}
	}
	return out
}

// ask runs the checks together and returns what they say, in their order. A check that does not return in time, because
// it waits for a disk, has failed; it is not begun again before it returns.
func (h *Health) ask(ctx context.Context) []error {
	type result struct {
		i   int
		err error
	}
	results := make(chan result, len(h.checks))
	errs := make([]error, len(h.checks))
	for i := range h.checks {
		c := &h.checks[i]
		errs[i] = errNoAnswer
		if !c.running.CompareAndSwap(false, true) {
			results <- result{i, errNoAnswer}
			continue
		}
		go func() {
			err := c.fn(ctx)
			c.running.Store(false)
			results <- result{i, err}
		}()
	}
	for range h.checks {
		select {
		case r := <-results:
			errs[r.i] = r.err
		case <-ctx.Done():
			return errs
		}
	}
	return errs
}

var errNoAnswer = errors.New("no answer in time")

func answer(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Cache-Control", "no-store")
	ServeJSON(w, status, v)
}

// AdminHandler serves health, readiness and metrics. A role may add routes of its own that only read. What control
// adds, and profiles where cfg.PProf is set, are for operators alone: see cfg.Control.
func AdminHandler(cfg ServerConfig, h *Health, g prometheus.Gatherer, control ...func(*http.ServeMux)) *http.ServeMux {
	m := http.NewServeMux()
	m.HandleFunc("GET /health", h.Health)
	m.HandleFunc("GET /readiness", h.readinessInFull)
	m.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{}))
	m.Handle("/", newGate(cfg, control))
	return m
}
