package login

import "github.com/prometheus/client_golang/prometheus"

type registerer = prometheus.Registerer

type metrics struct{ failed, throttled, refused, tokens prometheus.Counter }

func newMetrics(r registerer) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		failed:    counter("kraken_proxy_logins_failed_total", "Credentials that showed nobody."),
		throttled: counter("kraken_proxy_logins_throttled_total", "Logins that were refused unseen, because too many before them failed."),
		refused:   counter("kraken_proxy_access_refused_total", "Requests that the rules refused."),
		tokens:    counter("kraken_proxy_tokens_total", "Tokens that were given."),
	}
	r.MustRegister(m.failed, m.throttled, m.refused, m.tokens)
	return m
}
