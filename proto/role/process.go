package role

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"kraken/proto/config"
)

// LogConfig configures a process's log.
type LogConfig struct {
	Format string `yaml:"format"` // text (default) or json
	Level  string `yaml:"level"`  // debug, info (default), warn or error
}

func (c LogConfig) validate(m *config.Mistakes, key string) {
	if _, err := c.level(); err != nil {
		m.Add(key+".level", "%w", err)
	}
	if c.Format != "" && c.Format != "text" && c.Format != "json" {
		m.Add(key+".format", "%q: want text or json", c.Format)
	}
}

func (c LogConfig) level() (slog.Level, error) {
	if c.Level == "" {
		return slog.LevelInfo, nil
	}
	var l slog.Level
	if err := l.UnmarshalText([]byte(c.Level)); err != nil {
		return l, fmt.Errorf("%q: want debug, info, warn or error", c.Level)
	}
	return l, nil
}

// NewLogger writes to w.
func NewLogger(w io.Writer, cfg LogConfig) (*slog.Logger, error) {
	var m config.Mistakes
	if cfg.validate(&m, "log"); len(m) > 0 {
		return nil, m
	}
	level, err := cfg.level()
	if err != nil {
		return nil, err
	}
	o := slog.HandlerOptions{Level: level}
	if cfg.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, &o)), nil
	}
	return slog.New(slog.NewTextHandler(w, &o)), nil
}

// ExitHung is the exit code of a process that ended itself because it hangs.
const ExitHung = 3

// die ends the process even where nothing can be written to log: then without its stacks.
func die(log io.Writer, why error, last func()) {
	time.AfterFunc(5*time.Second, func() { os.Exit(ExitHung) })
	stacks := make([]byte, 8<<20)
	stacks = stacks[:runtime.Stack(stacks, true)]
	last()
	fmt.Fprintf(log, "ending: %v\n%s\n", why, stacks)
	os.Exit(ExitHung)
}

// version is set by the linker.
var version = "dev"

// Version is the version of this build, with its commit where the build knew it.
func Version() string {
	if info, ok := debug.ReadBuildInfo(); ok {
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				return version + " (" + s.Value + ")"
			}
		}
	}
	return version
}

// NewRegistry is the metrics of one process: what the Go runtime and the kernel count (memory, CPU, descriptors), and
// kraken_build_info, whose labels say what runs here.
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

// Group runs the parts of a process together. The first one that fails ends all, one that is done just ends; they are
// ended in the reverse order of Add, one after the other, so that a part may rely on those before it until it is done
// itself.
type Group struct {
	names []string
	parts []func(context.Context) error
}

// Add adds a part. It must return soon after its context is done.
func (g *Group) Add(name string, run func(context.Context) error) {
	g.names, g.parts = append(g.names, name), append(g.parts, run)
}

// Run returns when every part has returned, with all their errors.
func (g *Group) Run(ctx context.Context) error {
	n := len(g.parts)
	if n == 0 {
		return nil
	}
	errs := make([]error, n)
	cancels := make([]context.CancelFunc, n)
	done := make([]chan struct{}, n)
	ended := make(chan struct{}) // a part has failed, or all are done
	var once sync.Once
	var left atomic.Int64
	left.Store(int64(n))
	for i, run := range g.parts {
		pctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		cancels[i], done[i] = cancel, make(chan struct{})
		go func() {
			defer close(done[i])
			if err := run(pctx); err != nil && !errors.Is(err, context.Canceled) {
				errs[i] = fmt.Errorf("%s: %w", g.names[i], err)
				once.Do(func() { close(ended) })
			}
			if left.Add(-1) == 0 {
				once.Do(func() { close(ended) })
			}
		}()
	}
	select {
	case <-ctx.Done():
	case <-ended:
	}
	for i := n - 1; i >= 0; i-- {
		cancels[i]()
		<-done[i]
	}
	return errors.Join(errs...)
}
