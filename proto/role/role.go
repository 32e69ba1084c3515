// Package role is what the five roles have in common as processes: their command line, the configuration that each has,
// the log, the metrics, and the order in which they open, run and end. It knows nothing of what any of them does.
package role

import (
	"context"
	"log/slog"

	"github.com/prometheus/client_golang/prometheus"
)

// Deps is what a process gives to its role.
type Deps struct {
	Log      *slog.Logger
	Registry *prometheus.Registry
}

// Runner is a role that is open.
type Runner interface {
	// Run serves until ctx is done, then drains and closes. It is called once.
	Run(ctx context.Context) error
}
