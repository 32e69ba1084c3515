package upstream

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kraken/proto/registry"
)

// metrics counts what upstreams are asked. The label registry is the pattern of the configuration, of which there are
// few, whatever names are asked for.
type metrics struct {
	seconds *prometheus.HistogramVec
	bytes   *prometheus.CounterVec
	left    *prometheus.GaugeVec
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name:    "kraken_upstream_request_seconds",
			Help:    "Duration of requests to registries outside the cluster, logins included, by what was asked (head, manifest, referrers, tags, stat, blob) and result (ok, not_found, denied, error); of blobs until the first byte may come.",
			Buckets: []float64{.02, .1, .5, 2, 10, 60},
		}, []string{"registry", "request", "result"}),
		prometheus.NewCounterVec(prometheus.CounterOpts{Name: "kraken_upstream_received_bytes_total", Help: "Bytes of blobs that came from registries outside the cluster."}, []string{"registry"}),
		prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "kraken_upstream_ratelimit_remaining", Help: "Requests that a registry outside the cluster says are left in its window (RateLimit-Remaining)."}, []string{"registry"}),
	}
	if r != nil {
		r.MustRegister(m.seconds, m.bytes, m.left)
	}
	return m
}

func (m *metrics) asked(label string, k kind, err error, took time.Duration) {
	result := "ok"
	switch {
	case err == nil:
	case errors.Is(err, registry.ErrManifestUnknown), errors.Is(err, registry.ErrBlobUnknown), errors.Is(err, registry.ErrNameUnknown):
		result = "not_found"
	case errors.Is(err, registry.ErrUnauthorized), errors.Is(err, registry.ErrDenied):
		result = "denied"
	default:
		result = "error"
	}
	m.seconds.WithLabelValues(label, string(k), result).Observe(took.Seconds())
}

func (m *metrics) received(label string, n int) { m.bytes.WithLabelValues(label).Add(float64(n)) }
