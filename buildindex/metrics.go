package buildindex

import (
	"context"
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/registry"
)

type metrics struct {
	pushed, published, outboxErrors, setAside prometheus.Counter
}

func newMetrics(r prometheus.Registerer, x *Index) *metrics {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "kraken_build_index_" + name, Help: help})
		r.MustRegister(c)
		return c
	}
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "kraken_build_index_outbox_rows", Help: "Changes that are not in the bucket yet.",
	}, func() float64 {
		if !x.opened.Load() {
			return -1
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		state, err := x.db.State(ctx)
		if err != nil {
			return -1
		}
		return float64(state.OutboxRows)
	}))
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "kraken_build_index_set_aside", Help: "Changes and name records that can't go on for a reason of their own now.",
	}, func() float64 { _, n := x.aside.list(0); return float64(n) }))
	r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "kraken_build_index_free_bytes", Help: "Bytes that are free on the database's file system, -1 when that is not known.",
	}, func() float64 {
		space, err := x.space()
		if err != nil {
			return -1
		}
		return float64(space.Free)
	}))
	return &metrics{
		pushed:       counter("manifests_pushed_total", "Manifests accepted."),
		published:    counter("published_total", "Changes that are in the bucket now."),
		setAside:     counter("records_set_aside_total", "Name records at origins that were not believed or could not be adopted."),
		outboxErrors: counter("outbox_errors_total", "Failed tries of writing changes to the bucket."),
	}
}

// mirrorMetrics counts the answers about names of upstreams. The label registry is the pattern of the configuration.
type mirrorMetrics struct{ answers *prometheus.CounterVec }

// Results of a question about an upstream's name.
const (
	answerFresh  = "fresh"  // known, and not asked again yet
	answerAsked  = "asked"  // the upstream answered now
	answerStale  = "stale"  // it could not be asked, and what it said last was served
	answerGone   = "gone"   // it said 404
	answerDenied = "denied" // it refused
	answerNone   = "none"   // it could not be asked, and nothing is known
)

func newMirrorMetrics(r prometheus.Registerer) *mirrorMetrics {
	m := &mirrorMetrics{prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kraken_build_index_upstream_answers_total",
		Help: "Answers about tags and referrers of registries outside the cluster, by what they rest on (fresh, asked, stale, gone, denied, none).",
	}, []string{"registry", "result"})}
	r.MustRegister(m.answers)
	return m
}

func (m *mirrorMetrics) answered(q question, result string) {
	m.answers.WithLabelValues(q.up.Registry, result).Inc()
}

func (m *mirrorMetrics) failed(q question, err error) {
	switch {
	case errors.Is(err, registry.ErrManifestUnknown):
		m.answered(q, answerGone)
	case errors.Is(err, registry.ErrDenied), errors.Is(err, registry.ErrUnauthorized):
		m.answered(q, answerDenied)
	default:
		m.answered(q, answerNone)
	}
}
