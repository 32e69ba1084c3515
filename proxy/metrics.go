package proxy

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	leftBehind, short, refused prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		leftBehind: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kraken_proxy_upload_copies_left_behind_total",
			Help: "Copies of an upload that were given up because their origin failed or made no progress.",
		}),
		short: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kraken_proxy_uploads_short_total",
			Help: "Uploads that started on fewer origins than there are replicas.",
		}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kraken_proxy_uploads_refused_total",
			Help: "Upload requests that were answered with 429 because too many were under way, of their source or in all.",
		}),
	}
	r.MustRegister(m.leftBehind, m.short, m.refused)
	return m
}
