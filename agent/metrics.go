package agent

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	fromOrigins, fromHTTP, originFailures                                              prometheus.Counter
	hits, misses, relayed, failed, stale, trackerErrors, badMetainfo, evicted, doubted prometheus.Counter
	duration                                                                           prometheus.Histogram
}

func newMetrics(r prometheus.Registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "kraken_agent_" + name, Help: help})
		r.MustRegister(c)
		return c
	}
	m := &metrics{
		fromOrigins:    counter("origin_lease_bytes_total", "Bytes of leased pieces read from origins."),
		fromHTTP:       counter("origin_http_bytes_total", "Bytes of whole blobs read from origins over HTTP: small ones, and ones without metainfo."),
		originFailures: counter("origin_http_failures_total", "Origins that refused, broke off or were silent while a whole blob was read over HTTP; the next one went on."),
		hits:           counter("blob_hits_total", "Blob reads that the cache answered."),
		misses:         counter("blob_misses_total", "Blob reads that joined a download."),
		relayed:        counter("blobs_relayed_total", "Blob reads that the origins answered without the cache, which had no room."),
		failed:         counter("pulls_failed_total", "Downloads of blobs that exist which ended without the blob, other than by the readers' or the agent's own end."),
		stale:          counter("stale_manifests_total", "Manifests served although build-index was unreachable."),
		trackerErrors:  counter("tracker_errors_total", "Announces that the tracker did not answer."),
		badMetainfo:    counter("bad_metainfo_total", "Blobs whose pieces all passed while the whole did not."),
		doubted:        counter("blobs_doubted_total", "Blobs that origins were told to verify because they had sent other bytes or sizes."),
		evicted:        counter("evicted_total", "Blobs that made room for others."),
		duration: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "kraken_agent_pull_seconds", Help: "Time from the first request for a blob to its place in the cache.",
			Buckets: prometheus.ExponentialBuckets(0.01, 2, 18),
		}),
	}
	r.MustRegister(m.duration)
	return m
}
