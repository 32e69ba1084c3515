package chaos

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"time"

	"kraken/proto/registry"
)

// Options say what a run does.
type Options struct {
	Dir, Bin string // for state and logs; of the binaries
	Alone    bool   // the process is root in namespaces of its own
	Seed     uint64
	Faults   int
	Writers  int
	Readers  int
	Wanted   func(kind, role string) bool // faults; nil: all
	Log      func(format string, args ...any)
}

const (
	after      = 2 * time.Second // how long the time after a fault counts as its
	settleTime = 2 * time.Minute // for what is owed to reach the bucket
)

// Run starts a cluster, lets faults happen to it under load, and checks what is left. It returns what was seen, and the
// answers that must not have been given.
func Run(ctx context.Context, o Options) (_ *report, wrong []string, err error) {
	r, err := open(ctx, o.Dir, o.Bin, o.Alone)
	if r != nil {
		defer func() { err = errors.Join(err, r.close()) }()
	}
	if err != nil {
		return nil, nil, err
	}
	l, err := clients(r, o)
	if err != nil {
		return nil, nil, err
	}
	rep := newReport()
	l.note = rep.request
	loadCtx, stop := context.WithCancel(ctx)
	defer stop()
	l.start(loadCtx, o.Readers)
	err = faults(ctx, r, l, rep, o)
	stop()
	l.wait()
	if err != nil {
		return rep, l.m.violations(), err
	}
	l.note = func(string, time.Duration, error) {}
	return rep, l.m.violations(), errors.Join(check(ctx, r, l, o))
}

func clients(r *rig, o Options) (*load, error) {
	hc := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 64}}
	l := &load{m: newModel(o.Writers), seed: o.Seed}
	var err error
	if l.proxy, err = registry.NewClient(r.plan.URL(r.plan.Role("proxy")[0]), hc); err != nil {
		return nil, err
	}
	for _, c := range r.plan.Role("agent") {
		a, err := registry.NewClient(r.plan.URL(c), hc)
		if err != nil {
			return nil, err
		}
		l.agents = append(l.agents, a)
	}
	return l, nil
}

// faults lets o.Faults faults happen, one after the other.
func faults(ctx context.Context, r *rig, l *load, rep *report, o Options) error {
	rng := rand.New(rand.NewPCG(o.Seed, 0xfa017))
	wanted := o.Wanted
	if wanted == nil {
		wanted = func(string, string) bool { return true }
	}
	if err := sleep(ctx, after); err != nil {
		return err
	}
	for i := range o.Faults {
		f, err := draw(rng, r, wanted)
		if err != nil {
			return err
		}
		if f.quiet {
			if err := l.settle(ctx, r); err != nil {
				return fmt.Errorf("before fault %d, %s: %w", i+1, f, err)
			}
		}
		took, err := happen(ctx, r, rep, f)
		if err != nil {
			return fmt.Errorf("fault %d, %s: %w", i+1, f, err)
		}
		o.Log("fault %d of %d: %s for %s, ready after %s", i+1, o.Faults, f, seconds(f.hold), seconds(took))
		if err := sleep(ctx, time.Duration(rng.Int64N(int64(2*time.Second)))); err != nil {
			return err
		}
	}
	return nil
}

// settle holds changes up until all of those before are in the bucket.
func (l *load) settle(ctx context.Context, r *rig) error {
	l.gate.Lock()
	defer l.gate.Unlock()
	return r.plan.Settle(ctx, settleTime)
}

// happen lets one fault happen and end, and waits until its component is ready again.
func happen(ctx context.Context, r *rig, rep *report, f fault) (time.Duration, error) {
	rep.begin(&f)
	defer rep.begin(nil)
	if err := f.begin(ctx, r, f.part); err != nil {
		return 0, err
	}
	if err := sleep(ctx, f.hold); err != nil {
		return 0, err
	}
	began := time.Now()
	if err := f.end(ctx, r, f.part); err != nil {
		return 0, err
	}
	if err := r.plan.Await(ctx, f.part, readyLimit); err != nil {
		return 0, err
	}
	took := time.Since(began)
	rep.ready(&f, took)
	return took, sleep(ctx, after)
}

// check compares the cluster with the model: as it is, and after everything but the bucket was lost.
func check(ctx context.Context, r *rig, l *load, o Options) error {
	if err := r.plan.Settle(ctx, settleTime); err != nil {
		return fmt.Errorf("after the last fault: %w", err)
	}
	n := l.checkAll(ctx, "after the faults")
	o.Log("after the faults: %d names and blobs as they must be", n)
	for _, c := range r.plan.Components {
		if c.Role == "testfs" {
			continue
		}
		if err := r.plan.Kill(ctx, c.Name); err != nil {
			return err
		}
		key, keyErr := os.ReadFile(r.plan.StateDir(c) + "/upload.key")
		if err := r.plan.Wipe(c.Name); err != nil {
			return err
		}
		if keyErr == nil { // configuration, although the component made it by itself
			if err := os.WriteFile(r.plan.StateDir(c)+"/upload.key", key, 0o600); err != nil {
				return err
			}
		}
	}
	began := time.Now()
	for _, c := range r.plan.Components {
		if c.Role == "testfs" {
			continue
		}
		if err := r.plan.Start(ctx, c.Name); err != nil {
			return err
		}
	}
	if err := r.restored(ctx); err != nil {
		return err
	}
	o.Log("after the loss of everything but the bucket: names restored after %s", seconds(time.Since(began)))
	n = l.checkAll(ctx, "after the loss of everything but the bucket")
	o.Log("after the loss of everything but the bucket: %d names and blobs as they must be", n)
	return nil
}
