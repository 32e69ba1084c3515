package swarm

import (
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
)

// metrics are of all blobs together; the ones of a fetch are its Stats.
type metrics struct {
	refused, violations, banned    prometheus.Counter
	fromPeers, fromSources, wasted prometheus.Counter
	unreadable                     prometheus.Counter
	handshakes                     *prometheus.CounterVec // by reason and who refused
	all                            []prometheus.Collector
	reg                            prometheus.Registerer
}

func newMetrics(s *Swarm, reg prometheus.Registerer) (*metrics, error) {
	m := &metrics{reg: reg}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "kraken_swarm_" + name, Help: help})
		m.all = append(m.all, c)
		return c
	}
	gauge := func(name, help string, fn func() float64) {
		m.all = append(m.all, prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "kraken_swarm_" + name, Help: help}, fn))
	}
	m.refused = counter("refused_connections_total", "Connections refused: too many, banned, or not of this cluster.")
	m.violations = counter("protocol_violations_total", "Connections ended because of a message that is not allowed.")
	m.banned = counter("banned_peers_total", "Peers banned because they sent wrong bytes.")
	m.fromPeers = counter("received_peer_bytes_total", "Verified bytes that came from peers.")
	m.fromSources = counter("received_origin_bytes_total", "Verified bytes that came from origins over HTTP.")
	m.handshakes = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "kraken_swarm_handshakes_failed_total", Help: "TLS handshakes with peers that failed, by reason and by who refused, us or them.",
	}, []string{"reason", "by"})
	m.all = append(m.all, m.handshakes)
	m.unreadable = counter("unreadable_blocks_total", "Blocks that peers asked for and that could not be read from the disk.")
	m.wasted = counter("wasted_pieces_total", "Pieces that did not pass and were fetched again.")
	m.all = append(m.all, prometheus.NewCounterFunc(
		prometheus.CounterOpts{Name: "kraken_swarm_sent_bytes_total", Help: "Bytes of blobs sent to peers."},
		func() float64 { st := s.client.ConnStats(); return float64(st.BytesWrittenData.Int64()) }))
	m.all = append(m.all, prometheus.NewCounterFunc(
		prometheus.CounterOpts{Name: "kraken_swarm_duplicate_bytes_total", Help: "Bytes of blobs that peers sent though they were here already."},
		func() float64 {
			st := s.client.ConnStats()
			return float64(st.BytesReadData.Int64() - st.BytesReadUsefulData.Int64())
		}))
	gauge("connections", "Connections with peers.", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(len(s.conns) - len(s.unfinished.all))
	})
	gauge("unfinished_connections", "Accepted connections whose handshakes are not done.", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(len(s.unfinished.all))
	})
	gauge("loaded_torrents", "Blobs that are fetched or were asked for lately.", func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(len(s.loaded))
	})
	gauge("seedable_blobs", "Whole blobs that peers can ask for.", func() float64 { return float64(s.index.len()) })
	if reg == nil {
		return m, nil
	}
	for i, c := range m.all {
		if err := reg.Register(c); err != nil {
			m.all = m.all[:i]
			m.unregister()
			return nil, fmt.Errorf("register metrics of the swarm: %w", err)
		}
	}
	return m, nil
}

// unregister lets a closed swarm be forgotten.
func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all {
		m.reg.Unregister(c)
	}
}
