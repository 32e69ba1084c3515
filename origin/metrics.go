package origin

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	received, leased, replicated, writtenBack, writebackErrors, readThrough, evicted, namesRefused prometheus.Counter
	fromUpstream, fromUpstreamBytes, upstreamErrors, passed                                        prometheus.Counter
}

func newMetrics(r prometheus.Registerer, o *Origin) *metrics {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "kraken_origin_" + name, Help: help})
		r.MustRegister(c)
		return c
	}
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kraken_origin_" + name, Help: help}, f))
	}
	gauge("pending_blobs", "Blobs that are not in the bucket yet.", func() float64 { n, _ := o.store.Debts(); return float64(n) })
	gauge("lost_debts", "Of pending_blobs those whose file was lost here.", func() float64 { return float64(o.store.NumLost()) })
	gauge("names_unreadable", "Name records on disk that can't be read.", func() float64 { return float64(o.unreadable.Load()) })
	return &metrics{
		namesRefused:      counter("names_refused_total", "Name records and their deletions that did not hold or were not signed."),
		received:          counter("upload_bytes_total", "Bytes received in upload sessions."),
		leased:            counter("pieces_leased_total", "Pieces handed to agents."),
		replicated:        counter("replicated_total", "Blobs given to other origins."),
		writtenBack:       counter("written_back_total", "Blobs that are in the bucket now."),
		writebackErrors:   counter("writeback_errors_total", "Failed tries of writing a blob back."),
		readThrough:       counter("read_through_total", "Blobs fetched from the bucket."),
		fromUpstream:      counter("upstream_blobs_total", "Blobs fetched from registries that are mirrored."),
		fromUpstreamBytes: counter("upstream_bytes_total", "Their bytes."),
		upstreamErrors:    counter("upstream_errors_total", "Blobs that could not be fetched from registries that are mirrored."),
		passed:            counter("upstream_passed_total", "Reads of blobs that were passed on from registries that are mirrored, and not kept."),
		evicted:           counter("evicted_total", "Blobs that made room for others."),
	}
}
