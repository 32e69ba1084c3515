package transport

import (
	"runtime"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
)

// NewRegistry is the metrics of one process: what the Go runtime and the kernel count (memory, CPU, descriptors), and kraken_build_info,
// whose labels say what runs here.
func NewRegistry(role string) *prometheus.Registry {
	r := prometheus.NewRegistry()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "kraken_build_info", Help: "1; the labels say what runs here.",
		ConstLabels: prometheus.Labels{"role": role, "version": Version(), "go": runtime.Version()},
	})
	info.Set(1)
	r.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}
