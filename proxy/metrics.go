package proxy

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	doubted, leftBehind, short, refused, silent, madeGood prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	m := &metrics{
		leftBehind: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kraken_proxy_upload_copies_left_behind_total",
			Help: "Copies of an upload that were given up because their origin failed or made no progress.",
		}),
		short: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kraken_proxy_uploads_short_total",
			Help: "Uploads that started, or were committed, on fewer origins than there are replicas.",
		}),
		refused: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "kraken_proxy_uploads_refused_total",
			Help: "Upload requests that were answered with 429 because too many were under way, of their source or in all.",
		}),
	}
	m.silent = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "kraken_proxy_origins_silent_total",
		Help: "Requests that another origin answered because the one asked first did not in time.",
	})
	m.madeGood = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "kraken_proxy_upload_copies_made_good_total",
		Help: "Copies that were brought to another origin in the place of one that was left behind.",
	})
	m.doubted = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "kraken_proxy_blobs_doubted_total",
		Help: "Blobs that origins were told to verify: of another size than the membership's, or asked for twice.",
	})
	r.MustRegister(m.doubted, m.leftBehind, m.short, m.refused, m.silent, m.madeGood)
	return m
}
