package store

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// RegisterMetrics shows the state of the store. The numbers are read when they are asked for.
func (s *Store) RegisterMetrics(r prometheus.Registerer) {
	gauge := func(name, help string, f func() float64) {
		r.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kraken_store_" + name, Help: help}, f))
	}
	counter := func(name, help string, f func() int64) {
		opts := prometheus.CounterOpts{Name: "kraken_store_" + name, Help: help}
		r.MustRegister(prometheus.NewCounterFunc(opts, func() float64 { return float64(f()) }))
	}
	gauge("used_bytes", "Bytes that blobs, partial blobs and uploads take on disk.", func() float64 { used, _ := s.Usage(); return float64(used) })
	gauge("capacity_bytes", "Bytes that they may take, 0 for any number.", func() float64 { _, c := s.Usage(); return float64(c) })
	gauge("free_bytes", "Bytes that are free on the file system, -1 when that is not known.", func() float64 {
		space, err := s.Space()
		if err != nil {
			return -1
		}
		return float64(space.Free)
	})
	gauge("blobs", "Whole blobs.", func() float64 { return float64(s.status().Blobs) })
	gauge("pinned_blobs", "Digests that are pinned.", func() float64 { return float64(len(s.Pins())) })
	gauge("upload_sessions", "Upload sessions of clients.", func() float64 { return float64(s.held().sessions) })
	gauge("upload_bytes", "Bytes that upload sessions of clients have.", func() float64 { return float64(s.held().bytes) })
	gauge("upload_sources", "Sources that have upload sessions.", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(len(s.sessions.sources))
	})
	counter("uploads_refused_total", "Sessions and chunks that went beyond the bounds of upload sessions.", func() int64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return s.sessions.refused
	})
	counter("uploads_evicted_total", "Sessions of the source that takes most that made room for others'.", s.evictedSessions.Load)
	gauge("scanning", "1 while blobs that were there at the start may not be known yet, else 0.", func() float64 {
		if s.Scanning() {
			return 1
		}
		return 0
	})
	gauge("leaving_bytes", "Bytes of evicted blobs that are not removed from the disk yet.", func() float64 { return float64(s.status().Leaving) })
	counter("lost_blobs_total", "Blobs whose file somebody else has removed or changed: they were forgotten.", s.lost.Load)
	counter("scrubbed_bytes_total", "Bytes read to verify blobs again.", s.scrub.bytes.Load)
	counter("scrubbed_blobs_total", "Blobs verified again.", s.scrub.blobs.Load)
	counter("rotten_blobs_total", "Blobs that did not verify again.", s.scrub.rotten.Load)
	counter("scrub_passes_total", "Passes over all blobs.", s.scrub.passes.Load)
	gauge("scrub_age_seconds", "Time since the last pass over all blobs ended, -1 before the first.", func() float64 {
		if last := s.scrub.last.Load(); last > 0 {
			return time.Since(time.Unix(last, 0)).Seconds()
		}
		return -1
	})
}
