package main

import (
	"context"
	"errors"
	"slices"

	"kraken/test/bench/report"
)

// pair is two clusters that differ by TLS alone, plain and with it; they are measured by turns.
func (b *bench) pair(ctx context.Context, o options, fn func(plain, secure *cluster) error) (err error) {
	plain, err := b.newCluster(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, plain.close()) }()
	o.tls = true
	secure, err := b.newCluster(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, secure.close()) }()
	return fn(plain, secure)
}

// tlsCPU measures what TLS between peers and at the registry adds to the CPU time of a GiB delivered to n agents.
func tlsCPU(n int) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) error {
		return b.pair(ctx, options{agents: n}, func(plain, secure *cluster) error {
			var without, with []float64
			for range b.repeat {
				for _, x := range []struct {
					c    *cluster
					into *[]float64
				}{{plain, &without}, {secure, &with}} {
					blob, err := x.c.push(ctx, cpuSize)
					if err != nil {
						return err
					}
					s, err := x.c.cpuOf(ctx, blob)
					if err != nil {
						return err
					}
					*x.into = append(*x.into, s/float64(n))
					if err := x.c.renew(ctx); err != nil {
						return err
					}
				}
			}
			b.add(report.AtMost("TLS: CPU of a GiB, beside plain", map[string]any{"agents": n, "mib": cpuSize / mib}, report.Median(with)/report.Median(without), "x", 1.5,
				map[string]any{"plain_s": report.Median(without), "tls_s": report.Median(with)}))
			return nil
		})
	}
}

// tlsShaped measures what TLS adds to the time of the last of n agents on shaped links.
func tlsShaped(n, mbit int) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) error {
		const size = 64 * mib
		limit := bound(size, mbit, n)
		var last [2][]float64
		var busy []float64
		for i, secure := range []bool{false, true} { // one network is there at a time
			err := b.flashes(ctx, options{agents: n, shaped: true, mbit: mbit, tls: secure}, func(c *cluster) error {
				r, err := c.flash(ctx, mbit, size)
				if err == nil {
					last[i], busy = append(last[i], r.last()/limit), append(busy, r.busy)
				}
				return err
			})
			if err != nil {
				return err
			}
		}
		without, with := report.Median(last[0]), report.Median(last[1])
		b.add(valid(report.AtMost("TLS: shaped, last agent, beside plain", map[string]any{"agents": n, "mbit": mbit, "mib": size / mib}, with/without, "x", 1.03,
			map[string]any{"plain": without, "tls": with, "bound_s": limit}), slices.Max(busy)))
		return nil
	}
}

// flashes calls fn on a cluster as often as a measurement is repeated.
func (b *bench) flashes(ctx context.Context, o options, fn func(*cluster) error) (err error) {
	c, err := b.newCluster(ctx, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.close()) }()
	for range b.repeat {
		if err := fn(c); err != nil {
			return err
		}
	}
	return nil
}
