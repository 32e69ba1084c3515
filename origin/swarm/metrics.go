package swarm

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	received, sent prometheus.Counter // with peers, on the wire
	refused        prometheus.Counter
	bans           prometheus.Counter
	fromPeers      prometheus.Counter // pieces
	fromSources    prometheus.Counter // pieces
	wasted         prometheus.Counter // pieces
	rescues        prometheus.Counter
}

func newMetrics(r prometheus.Registerer) *metrics {
	counter := func(name, help string, labels prometheus.Labels) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "kraken_swarm_" + name, Help: help, ConstLabels: labels})
		if r != nil {
			r.MustRegister(c)
		}
		return c
	}
	return &metrics{
		received:    counter("received_bytes_total", "Bytes read from peer connections, protocol included.", prometheus.Labels{"from": "peers"}),
		sent:        counter("sent_bytes_total", "Bytes written to peer connections, protocol included.", prometheus.Labels{"to": "peers"}),
		refused:     counter("refused_connections_total", "Peers shown out: banned ones, and strangers where only our own are let in.", nil),
		bans:        counter("bans_total", "Peers banned for wrong bytes.", nil),
		fromPeers:   counter("pieces_total", "Pieces verified, by where they came from.", prometheus.Labels{"from": "peers"}),
		fromSources: counter("pieces_total", "Pieces verified, by where they came from.", prometheus.Labels{"from": "origins"}),
		wasted:      counter("pieces_wasted_total", "Pieces that failed their hash.", nil),
		rescues:     counter("rescues_total", "Times that a stalled download asked an origin for pieces that others have.", nil),
	}
}
