package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"kraken/deploy/devcluster"
	"kraken/test/bench/report"
)

// Names of contestants.
const (
	rival      = "docker-registry"
	oneOrigin  = "kraken-1"
	twoOrigins = "kraken-2"
	twoOverTLS = "kraken-2-tls"
)

// contestant is a registry that is measured: some processes, with an address for clients. One of plan and rival is nil.
type contestant struct {
	name, addr string
	scheme     string              // of its URLs
	plan       *devcluster.Cluster // of Kraken
	rival      *rivalProcess
}

const (
	startTimeout = 30 * time.Second
	stopTimeout  = 40 * time.Second
	quietTimeout = 5 * time.Minute
)

// startAll starts every contestant of a row in dir. stop ends what was started, also after an error.
func startAll(ctx context.Context, r row, bin, dir string) (cs []*contestant, stop func() error, err error) {
	stop = func() error {
		var errs []error
		for _, c := range cs {
			errs = append(errs, c.stop())
		}
		return errors.Join(errs...)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, stop())
		}
	}()
	starts := []func() (*contestant, error){
		func() (*contestant, error) { return startRival(ctx, filepath.Join(dir, rival)) },
		func() (*contestant, error) { return startKraken(ctx, bin, dir, oneOrigin, 1, false) },
		func() (*contestant, error) { return startKraken(ctx, bin, dir, twoOrigins, 2, false) },
	}
	if r.tls {
		starts = append(starts, func() (*contestant, error) { return startKraken(ctx, bin, dir, twoOverTLS, 2, true) })
	}
	for _, start := range starts {
		c, err := start()
		if err != nil {
			return cs, stop, err
		}
		cs = append(cs, c)
	}
	return cs, stop, nil
}

// startKraken starts a cluster with as many origins as there are replicas, and a folder as bucket. With secure
// everything in it speaks TLS, and clients do.
func startKraken(ctx context.Context, bin, dir, name string, replicas int, secure bool) (*contestant, error) {
	quiet := map[string]any{"log": map[string]any{"level": "warn"}}
	plan, err := devcluster.Plan(devcluster.Options{
		Dir: filepath.Join(dir, name), Bin: bin, Origins: replicas, Agents: 1, FreePorts: true, FolderBucket: true, Bound: true, MutualTLS: secure,
		Config: map[string]map[string]any{"origin": quiet, "tracker": quiet, "build-index": quiet, "proxy": quiet, "agent": quiet},
	})
	if err != nil {
		return nil, err
	}
	if err := plan.Up(ctx, io.Discard); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	scheme := "http://"
	if secure {
		scheme = "https://"
	}
	return &contestant{name: name, addr: plan.Role("proxy")[0].Addr, scheme: scheme, plan: plan}, nil
}

// quiet returns when nothing is left to be written in the background, and the disk has what was written.
func (c *contestant) quiet(ctx context.Context) error {
	if c.plan != nil {
		if err := c.plan.Settle(ctx, quietTimeout); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	syscall.Sync()
	return nil
}

// pids are the contestant's processes by their names.
func (c *contestant) pids() map[string]int {
	if c.plan == nil {
		return map[string]int{rival: c.rival.cmd.Process.Pid}
	}
	out := map[string]int{}
	for _, x := range c.plan.Components {
		name := x.ID()
		if x.Role != "origin" { // of the others there is one
			name = x.Role
		}
		out[name] = x.PID()
	}
	return out
}

// cpu is the CPU time of all processes in seconds, to a hundredth.
func (c *contestant) cpu() float64 {
	var sum time.Duration
	for _, pid := range c.pids() {
		used, err := devcluster.CPU(pid)
		if err != nil {
			continue // ended; the measurement fails by itself
		}
		sum += used
	}
	return sum.Seconds()
}

// stop ends the processes.
func (c *contestant) stop() error {
	if c.plan != nil {
		return c.plan.Down(context.Background(), io.Discard)
	}
	return c.rival.stop()
}

// peaks is the highest peak of memory of each process, in MiB, by contestant and process.
type peaks map[[2]string]float64

func (ps peaks) add(cs []*contestant) error {
	for _, c := range cs {
		for name, pid := range c.pids() {
			peak, err := devcluster.Memory(pid, "VmHWM")
			if err != nil {
				return fmt.Errorf("%s of %s ended: %w; the end of its log:\n%s", name, c.name, err, c.log(name))
			}
			key := [2]string{c.name, name}
			ps[key] = max(ps[key], float64(peak)/(1<<20))
		}
	}
	return nil
}

// log is the end of the log of a process, by the name that pids has for it.
func (c *contestant) log(name string) string {
	if c.plan == nil {
		return c.rival.tail()
	}
	for _, x := range c.plan.Components {
		if x.ID() == name || x.Role == name {
			return c.plan.Tail(context.Background(), x)
		}
	}
	return ""
}

const rowMemory = "peak memory"

func (ps peaks) rows() (out []report.Row) {
	keys := slices.SortedFunc(maps.Keys(ps), func(a, b [2]string) int { return strings.Compare(a[0]+" "+a[1], b[0]+" "+b[1]) })
	for _, k := range keys {
		params := map[string]any{"registry": k[0], "process": k[1]}
		if k[0] == rival {
			out = append(out, report.Plain(rowMemory, params, ps[k], "MiB", nil))
			continue
		}
		out = append(out, report.Below(rowMemory, params, ps[k], "MiB", memoryMiB, nil))
	}
	return out
}
