package tracker

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	batched, stock                               prometheus.Counter
	blobs, refused                               prometheus.Counter
	metainfoHits, metainfoMisses, metainfoErrors prometheus.Counter
	register                                     prometheus.Registerer
}

func newMetrics(r prometheus.Registerer) *metrics {
	announces := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kraken_tracker_announces_total", Help: "Announces that were taken, of agents (batched) and of stock clients.",
	}, []string{"kind"})
	r.MustRegister(announces)
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "kraken_tracker_" + name, Help: help})
		r.MustRegister(c)
		return c
	}
	return &metrics{
		batched: announces.WithLabelValues("batched"), stock: announces.WithLabelValues("stock"),
		blobs:          counter("announced_blobs_total", "States of blobs in all announces."),
		refused:        counter("refused_blobs_total", "States of blobs that were not kept because a limit is reached."),
		metainfoHits:   counter("metainfo_hits_total", "Questions for metainfo that memory answered."),
		metainfoMisses: counter("metainfo_misses_total", "Questions for metainfo that waited for an origin."),
		metainfoErrors: counter("metainfo_errors_total", "Fetches of metainfo that failed, the blob being unknown included."),
		register:       r,
	}
}

// watch adds the gauges of what is kept.
func (m *metrics) watch(s *store, c *metainfos) {
	gauge := func(name, help string, value func() float64) {
		m.register.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kraken_tracker_" + name, Help: help}, value))
	}
	gauge("swarms", "Blobs that at least one peer has some of.", func() float64 { n, _, _ := s.counts(); return float64(n) })
	gauge("peers", "Distinct peers.", func() float64 { _, n, _ := s.counts(); return float64(n) })
	gauge("pairs", "Peers times the blobs that each has.", func() float64 { _, _, n := s.counts(); return float64(n) })
	gauge("metainfo_bytes", "Memory that kept metainfo takes.", func() float64 { return float64(c.bytes()) })
}
