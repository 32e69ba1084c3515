package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"kraken/deploy/devcluster"
	"kraken/test/bench/report"
	"kraken/test/netns"
)

const (
	mib = 1 << 20
	// busyLimit is the machine's CPU use above which a time says more about the machine than about the swarm.
	busyLimit = 0.9
)

// seconds is how long size bytes take through a link.
func seconds(size int64, mbit int) float64 { return float64(size) * 8 / (float64(mbit) * 1e6) }

// bound is max(F/u, F/min d, N·F/(u + Σu_i)) for equal links.
func bound(size int64, mbit, n int) float64 {
	return seconds(size, mbit) * max(1, float64(n)/float64(n+1))
}

// round is one measurement.
type round struct {
	took   []float64 // seconds, sorted; of agents that completed
	copies float64   // that the origin sent
	twice  float64   // what an agent received in the mean above one copy, in copies
	busy   float64   // of the machine's CPU
	s      *sampler
}

func (r round) median() float64 { return report.Median(r.took) }
func (r round) last() float64   { return r.took[len(r.took)-1] }

// race shapes the links and calls pull for each agent at once. midway, if not nil, runs beside the pulls; agents that
// it reports as gone may fail.
func (c *cluster) race(ctx context.Context, mbit int, size int64, pull func(context.Context, int) (float64, error), midway func(context.Context) (gone []int, err error)) (r round, err error) {
	limited := c.net.Nodes[1:] // all but the core
	if err := c.net.Shape(mbit, limited...); err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, c.net.Shape(0, limited...)) }()
	before, err := c.net.Traffic()
	if err != nil {
		return r, err
	}
	used0, total0 := machine()
	s := sample(c.net, 250*time.Millisecond)
	took, errs := make([]float64, len(c.agents)), make([]error, len(c.agents))
	var wg sync.WaitGroup
	for i := range c.agents {
		wg.Go(func() { took[i], errs[i] = pull(ctx, i) })
	}
	var gone []int
	var merr error
	if midway != nil {
		gone, merr = midway(ctx)
	}
	wg.Wait()
	used1, total1 := machine()
	after, terr := c.net.Traffic()
	if merr != nil {
		merr = errors.Join(append(errs, merr)...) // what became of the pulls may say why
	}
	if err := errors.Join(s.stop(), terr, merr); err != nil {
		return r, err
	}
	for i := range c.agents {
		if slices.Contains(gone, i) {
			continue
		}
		if errs[i] != nil {
			return r, fmt.Errorf("%s: %w", c.agents[i].ID(), errs[i])
		}
		r.took = append(r.took, took[i])
	}
	slices.Sort(r.took)
	r.copies = float64(after[c.origin.ID()].Sent-before[c.origin.ID()].Sent) / float64(size)
	for _, a := range c.agents {
		r.twice += float64(after[a.ID()].Received-before[a.ID()].Received) / float64(size) / float64(len(c.agents))
	}
	r.twice--
	r.busy, r.s = (used1-used0)/(total1-total0), s
	return r, nil
}

// flash is the plain case: all agents want one blob at the same moment.
func (c *cluster) flash(ctx context.Context, mbit int, size int64) (round, error) {
	blob, err := c.push(ctx, size)
	if err != nil {
		return round{}, err
	}
	return c.race(ctx, mbit, size, func(ctx context.Context, i int) (float64, error) {
		p, err := c.pull(ctx, c.agents[i], blob)
		return p.took.Seconds(), err
	}, nil)
}

// valid returns a row whose goal does not hold on a machine that was too busy.
func valid(r report.Row, busy float64) report.Row {
	r.Beside["cpu"] = busy
	if busy > busyLimit {
		r.Beside["invalid"] = "the machine was busy"
		r.Holds = false
	}
	return r
}

// slowLimit bounds a measurement on slow links, as a ratio to its bound: a crowd that keeps itself from the pieces may
// never end.
const slowLimit = 4

// slowShaped is n agents that want a small blob through links on which a piece takes half a second, so that the first
// pieces take many seconds to reach all. It is not compared with an HTTP server, which would take hours.
func slowShaped(n, mbit int) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) (err error) {
		const size = 16 * mib
		c, err := b.newCluster(ctx, options{agents: n, shaped: true, mbit: mbit})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.close()) }()
		limit := bound(size, mbit, n)
		var median, last, copies, busy []float64
		for range b.repeat {
			rctx, cancel := context.WithTimeoutCause(ctx, time.Duration(slowLimit*limit*float64(time.Second)), fmt.Errorf("not within %d times the bound", slowLimit))
			r, err := c.flash(rctx, mbit, size)
			cancel()
			if err != nil {
				return err
			}
			median, last = append(median, r.median()/limit), append(last, r.last()/limit)
			copies, busy = append(copies, r.copies), append(busy, r.busy)
			if err := b.draw(fmt.Sprintf("slow-%d", n), r.s, c.net, size); err != nil {
				return err
			}
		}
		params := map[string]any{"agents": n, "mbit": mbit, "mib": size / mib}
		b.add(valid(report.AtMost("slow links, last agent", params, report.Median(last), "x bound", 1.5,
			map[string]any{"median": report.Median(median), "origin_copies": report.Median(copies), "bound_s": limit}), slices.Max(busy)))
		return nil
	}
}

func shaped(n, mbit int, told bool) func(*bench, context.Context) error {
	return func(b *bench, ctx context.Context) (err error) {
		const size = 64 * mib
		o := options{agents: n, shaped: true}
		name := "untold"
		if told {
			o.mbit, name = mbit, "shaped"
		}
		c, err := b.newCluster(ctx, o)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, c.close()) }()
		limit := bound(size, mbit, n)
		var median, last, copies, twice, busy []float64
		for range b.repeat {
			r, err := c.flash(ctx, mbit, size)
			if err != nil {
				return err
			}
			median, last = append(median, r.median()/limit), append(last, r.last()/limit)
			copies, twice, busy = append(copies, r.copies), append(twice, r.twice), append(busy, r.busy)
			if err := b.draw(fmt.Sprintf("%s-%d", name, n), r.s, c.net, size); err != nil {
				return err
			}
		}
		params := map[string]any{"agents": n, "mbit": mbit, "mib": size / mib}
		beside := func() map[string]any {
			return map[string]any{"origin_copies": report.Median(copies), "received_twice": report.Median(twice), "bound_s": limit}
		}
		cpu := slices.Max(busy)
		if !told {
			b.add(valid(report.Plain("untold median", params, report.Median(median), "x bound", beside()), cpu),
				valid(report.AtMost("untold last agent", params, report.Median(last), "x bound", 1.35, beside()), cpu))
			return nil
		}
		web, err := c.overHTTP(ctx, mbit, n)
		if err != nil {
			return err
		}
		withHTTP := beside()
		withHTTP["http_server"] = web
		b.add(valid(report.AtMost("shaped median", params, report.Median(median), "x bound", 1.12, withHTTP), cpu),
			valid(report.AtMost("shaped last agent", params, report.Median(last), "x bound", 1.20, beside()), cpu))
		return nil
	}
}

// overHTTP is the same with a plain HTTP server in the origin's place, as a ratio to the bound. The blob is smaller:
// the ratio does not depend on it, and the time is N times that of one copy.
func (c *cluster) overHTTP(ctx context.Context, mbit, n int) (float64, error) {
	const size = 4 * mib
	blob, err := newBlob(size)
	if err != nil {
		return 0, err
	}
	dir := filepath.Join(c.plan.Dir, "www")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return 0, err
	}
	if err := writeBlob(filepath.Join(dir, "blob"), blob); err != nil {
		return 0, err
	}
	l, err := c.origin.Host().Listen(18080)
	if err != nil {
		return 0, err
	}
	srv := &http.Server{Handler: http.FileServer(http.Dir(dir)), ReadHeaderTimeout: time.Minute}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(l) }()
	r, err := c.race(ctx, mbit, size, func(ctx context.Context, i int) (float64, error) {
		p, err := get(ctx, c.agents[i].Host().Client(), "http://"+l.Addr().String()+"/blob", blob.digest)
		return p.took.Seconds(), err
	}, nil)
	if cerr := errors.Join(err, srv.Close()); cerr != nil {
		return 0, cerr
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return 0, err
	}
	return r.last() / bound(size, mbit, n), nil
}

// special is a cluster of n agents on told links for the rows that something happens in.
func (b *bench) special(ctx context.Context, n int, fn func(c *cluster) error) error {
	c, err := b.newCluster(ctx, options{agents: n, shaped: true, mbit: 25})
	if err != nil {
		return err
	}
	return errors.Join(fn(c), c.close())
}

const eight, mbit25 = 8, 25

func twoBlobs(b *bench, ctx context.Context) error {
	return b.special(ctx, eight, func(c *cluster) error {
		const size = 32 * mib
		one, err := c.push(ctx, size)
		if err != nil {
			return err
		}
		two, err := c.push(ctx, size)
		if err != nil {
			return err
		}
		r, err := c.race(ctx, mbit25, 2*size, func(ctx context.Context, i int) (float64, error) {
			var took [2]pulled
			var errs [2]error
			var wg sync.WaitGroup
			for k, x := range []blobOf{one, two} {
				wg.Go(func() { took[k], errs[k] = c.pull(ctx, c.agents[i], x) })
			}
			wg.Wait()
			return max(took[0].took, took[1].took).Seconds(), errors.Join(errs[:]...)
		}, nil)
		if err != nil {
			return err
		}
		return b.event("two blobs at once", r, 0, bound(2*size, mbit25, eight), 2*size, c)
	})
}

// event adds a row of one of the special cases, and its drawing. limit is the bound of what was left at the second at.
func (b *bench) event(name string, r round, at, limit float64, size int64, c *cluster) error {
	b.add(valid(report.AtMost(name, map[string]any{"agents": len(c.agents), "mbit": mbit25}, (r.last()-at)/limit, "x bound", 1.5,
		map[string]any{"origin_copies": r.copies, "from_s": at, "bound_s": limit, "completed": len(r.took)}), r.busy))
	return b.draw(strings.ReplaceAll(name, " ", "-"), r.s, c.net, size)
}

func arrivals(b *bench, ctx context.Context) error {
	return b.special(ctx, eight, func(c *cluster) error {
		const size, gap = 64 * mib, 500 * time.Millisecond
		blob, err := c.push(ctx, size)
		if err != nil {
			return err
		}
		r, err := c.race(ctx, mbit25, size, func(ctx context.Context, i int) (float64, error) {
			select {
			case <-time.After(time.Duration(i) * gap):
			case <-ctx.Done():
				return 0, context.Cause(ctx)
			}
			p, err := c.pull(ctx, c.agents[i], blob)
			return p.took.Seconds() + (time.Duration(i) * gap).Seconds(), err
		}, nil)
		if err != nil {
			return err
		}
		// The last one to come can't be done before its own link has carried the blob.
		limit := max(bound(size, mbit25, eight), (time.Duration(eight-1)*gap).Seconds()+seconds(size, mbit25))
		return b.event("arrivals", r, 0, limit, size, c)
	})
}

// left is the bound of what agents still lack, from what they have received so far: the slowest link, and all links
// together.
func left(got netns.Traffic, agents []*devcluster.Component, size int64, mbit, uplinks int) float64 {
	var most, all int64
	for _, a := range agents {
		n := max(0, size-got[a.ID()].Received)
		most, all = max(most, n), all+n
	}
	return max(seconds(most, mbit), seconds(all, mbit)/float64(uplinks))
}

// kill pulls one blob with n agents and kills processes when the traffic since the start says so. killed does it; it
// returns the agents that are gone, and how many links can still send. The time is measured from there, against the
// bound of what is left.
func (b *bench) kill(ctx context.Context, name string, n int, when func(*cluster, netns.Traffic) bool, killed func(*cluster) (gone []int, uplinks int, err error)) error {
	return b.special(ctx, n, func(c *cluster) error {
		blob, err := c.push(ctx, killSize)
		if err != nil {
			return err
		}
		before, err := c.net.Traffic()
		if err != nil {
			return err
		}
		var limit, at float64
		began := time.Now()
		r, err := c.race(ctx, mbit25, killSize, func(ctx context.Context, i int) (float64, error) {
			p, err := c.pull(ctx, c.agents[i], blob)
			return p.took.Seconds(), err
		}, func(ctx context.Context) ([]int, error) {
			var got netns.Traffic
			err := eventually(ctx, 2*time.Minute, name, func() (_ bool, err error) {
				got, err = c.net.Since(before)
				return when(c, got), err
			})
			gone, uplinks, kerr := killed(c)
			var alive []*devcluster.Component
			for i, a := range c.agents {
				if !slices.Contains(gone, i) {
					alive = append(alive, a)
				}
			}
			at, limit = time.Since(began).Seconds(), left(got, alive, killSize, mbit25, uplinks)
			return gone, errors.Join(err, kerr)
		})
		if err != nil {
			return err
		}
		return b.event(name, r, at, limit, killSize, c)
	})
}

const killSize = 64 * mib

func killThird(b *bench, ctx context.Context) error {
	const n = 9
	return b.kill(ctx, "a third killed midway", n, func(c *cluster, got netns.Traffic) bool {
		return got[c.agents[n-1].ID()].Received > killSize/2
	}, func(c *cluster) (gone []int, uplinks int, err error) {
		for i := range n / 3 {
			err = errors.Join(err, c.plan.Kill(ctx, c.agents[i].Name))
			gone = append(gone, i)
		}
		return gone, 1 + n - n/3, err
	})
}

func killOrigin(b *bench, ctx context.Context) error {
	// One copy was sent when every piece was: the origin's traffic is more than the blob, and it has nothing left to
	// send that nobody has. Without the second, pieces that it sent twice could stand for others.
	var before int64
	since := time.Now()
	return b.kill(ctx, "origin killed after one copy", eight, func(c *cluster, got netns.Traffic) bool {
		sent := got[c.origin.ID()].Sent
		if sent-before > 64<<10 {
			before, since = sent, time.Now()
		}
		return sent > killSize && (float64(sent) > killSize*1.02 || time.Since(since) > 200*time.Millisecond)
	}, func(c *cluster) ([]int, int, error) {
		return nil, eight, c.plan.Kill(ctx, c.origin.Name)
	})
}
