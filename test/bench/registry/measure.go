package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"time"
)

// row is one thing that is measured.
type row struct {
	name   string
	push   bool // two replicas have a goal of their own
	tls    bool // measured over TLS too
	params func(o options, clients int) map[string]any
	// fresh says that every run needs registries that are empty: what it leaves is too large to keep.
	fresh bool
	// seed brings a registry to where runs start, without being timed. May be nil.
	seed func(ctx context.Context, b *bench, c *contestant) error
	// prepare makes what one run needs; what it returns is timed.
	prepare func(ctx context.Context, b *bench, c *contestant, run int) (func(ctx context.Context) error, error)
}

var rows = []row{
	{name: "push images", push: true, tls: true, params: imageParams, seed: warmUp, prepare: pushImages},
	{name: "push layer", push: true, tls: true, fresh: true, params: func(o options, clients int) map[string]any {
		return map[string]any{"layer_mib": o.layer >> 20 / int64(clients)}
	}, prepare: pushLayer},
	{name: "pull layer", tls: true, params: func(o options, _ int) map[string]any {
		return map[string]any{"layer_mib": o.layer >> 20}
	}, seed: seedLayer, prepare: pullLayer},
	{name: "list tags", params: nameParams, seed: seedTags, prepare: listTags},
	{name: "list catalog", params: nameParams, seed: seedRepositories, prepare: listCatalog},
}

func imageParams(o options, _ int) map[string]any {
	return map[string]any{"images": o.images, "blob_kib": imageBlob >> 10}
}
func nameParams(o options, _ int) map[string]any {
	return map[string]any{"names": o.names, "lists_a_client": listsPerClient}
}

// bench is what the runs of one row share.
type bench struct {
	options
	clients int
	layers  *layers
	pulled  map[string]string // by contestant, what pullLayer reads
}

// measure returns the seconds of every run, by number of clients and contestant. Contestants take turns within each
// repetition.
func measure(ctx context.Context, o options, r row, ps peaks) (times map[int]map[string][]float64, err error) {
	b := &bench{options: o, pulled: map[string]string{}}
	dir := filepath.Join(o.dir, "client")
	if b.layers, err = newLayers(dir); err != nil {
		return nil, err
	}
	times = map[int]map[string][]float64{}
	for _, n := range o.clients {
		times[n] = map[string][]float64{}
	}
	if !r.fresh {
		if err := b.session(ctx, r, func(cs []*contestant) error {
			for _, n := range o.clients {
				for run := range o.repeat {
					if err := b.turns(ctx, r, cs, n, run, times[n]); err != nil {
						return err
					}
				}
			}
			return nil
		}, ps); err != nil {
			return nil, err
		}
		return times, os.RemoveAll(dir)
	}
	for _, n := range o.clients {
		for run := range o.repeat {
			if err := b.session(ctx, r, func(cs []*contestant) error { return b.turns(ctx, r, cs, n, run, times[n]) }, ps); err != nil {
				return nil, err
			}
		}
	}
	return times, os.RemoveAll(dir)
}

// session starts the contestants with nothing, has some runs measured and removes all that they wrote.
func (b *bench) session(ctx context.Context, r row, measured func([]*contestant) error, ps peaks) (err error) {
	dir := filepath.Join(b.dir, "registries")
	cs, stop, err := startAll(ctx, r, b.bin, dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop(), os.RemoveAll(dir)) }()
	for _, c := range cs {
		if r.seed == nil {
			break
		}
		began := time.Now()
		b.clients = seeders
		if err := r.seed(ctx, b, c); err != nil {
			return fmt.Errorf("seed %s: %w", c.name, err)
		}
		progress("%s: %s is ready after %.1f s", r.name, c.name, time.Since(began).Seconds())
	}
	if err := measured(cs); err != nil {
		return err
	}
	return ps.add(cs)
}

// turns measures one run of each contestant. Another one begins each time, so that none always comes after the same.
func (b *bench) turns(ctx context.Context, r row, cs []*contestant, clients, run int, times map[string][]float64) error {
	b.clients = clients
	for i := range cs {
		c := cs[(i+run)%len(cs)]
		timed, err := r.prepare(ctx, b, c, run)
		if err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		for _, c := range cs {
			if err := c.quiet(ctx); err != nil {
				return err
			}
		}
		cpu, began := c.cpu(), time.Now()
		if err := timed(ctx); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
		took := time.Since(began).Seconds()
		times[c.name] = append(times[c.name], took)
		progress("%s, %d clients, run %d: %s %.3f s, CPU %.2f s", r.name, clients, run+1, c.name, took, c.cpu()-cpu)
	}
	return nil
}

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

// each runs f for every client at once and waits.
func (b *bench) each(ctx context.Context, f func(ctx context.Context, client int) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	errs := make([]error, b.clients)
	var wg sync.WaitGroup
	for i := range b.clients {
		wg.Go(func() {
			if errs[i] = f(ctx, i); errs[i] != nil {
				cancel()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

// crane runs the tool; what it writes to standard output goes nowhere.
func (b *bench) crane(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, filepath.Join(b.bin, "tools", "crane"), append([]string{"--insecure"}, args...)...)
	var text tail
	cmd.Stderr = &text
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("crane %s: %w: %s", args[0], err, text)
	}
	return nil
}

// tail keeps the first part of what a program complains about.
type tail []byte

func (t *tail) Write(p []byte) (int, error) {
	*t = append(*t, p[:min(len(p), 2000-min(2000, len(*t)))]...)
	return len(p), nil
}

func pushLayer(ctx context.Context, b *bench, c *contestant, run int) (func(context.Context) error, error) {
	var dirs []string
	for client := range b.clients {
		dir, _, err := b.layers.fresh(client, b.layer/int64(b.clients))
		if err != nil {
			return nil, err
		}
		dirs = append(dirs, dir)
	}
	return func(ctx context.Context) error {
		return b.each(ctx, func(ctx context.Context, client int) error {
			return b.crane(ctx, "push", dirs[client], fmt.Sprintf("%s/bench/layer-%d:run-%d", c.addr, client, run))
		})
	}, nil
}

func seedLayer(ctx context.Context, b *bench, c *contestant) error {
	dir, digest, err := b.layers.fresh(0, b.layer)
	if err != nil {
		return err
	}
	b.pulled[c.name] = fmt.Sprintf("%s/bench/layer@%s", c.addr, digest)
	return b.crane(ctx, "push", dir, c.addr+"/bench/layer:seed")
}

// pullLayer reads the layer that was seeded: from the kernel's memory, as in a pull that follows a push.
func pullLayer(_ context.Context, b *bench, c *contestant, _ int) (func(context.Context) error, error) {
	return func(ctx context.Context) error {
		return b.each(ctx, func(ctx context.Context, _ int) error { return b.crane(ctx, "blob", b.pulled[c.name]) })
	}, nil
}
