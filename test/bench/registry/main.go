// Command registry measures Kraken's front door beside Debian's docker-registry: pushes of many small images, push and
// pull of a large layer through crane, and lists, each with 1 and with 16 clients. A value is a ratio of times, so that
// it means the same on any machine; the times themselves stand beside it.
//
// The contestants are processes of its own on loopback, with all their data in one fresh folder on one disk:
//
//	docker-registry  Debian's package, files on disk, Debian's settings without the login
//	kraken-1         proxy, build-index, tracker, agent and one origin that keeps every blob, a folder as bucket
//	kraken-2         the same with two origins that both keep every blob
//	kraken-2-tls     the same with TLS between all parts and at the door; how much longer it takes is beside kraken-2
//
// They are measured in turn, again and again, never at once, and not before whatever one of them still writes in the
// background is on the disk. What Kraken writes back to its bucket meanwhile counts for the push it belongs to as far
// as both overlap.
//
// Both sides make durable what they acknowledge. docker-registry 2.8.2 syncs each file that it writes, twice (seen by
// strace: 40 calls of fsync for 20 files of an image of config and layer), but no folder, and it writes a tag's link in
// place, without a rename: after a power cut a name can be missing or torn. Kraken syncs files and folders, and its
// database's log; with two origins what they hold twice.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"maps"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"kraken/test/bench/report"
)

// Goals, as ratios to docker-registry's time, and of memory.
const (
	oneReplica        = 1.0
	twoReplicasPushes = 1.5
	memoryMiB         = 150
	overTLS           = 1.15 // of plain, for pushes
)

type options struct {
	bin, dir, out, only string
	clients             []int
	repeat              int
	merge               bool
	layer               int64
	images, names       int
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "bench-registry:", err)
		os.Exit(1)
	}
}

func run() error {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "folder of Kraken's binaries, and of crane in tools/")
	flag.StringVar(&o.out, "out", "test/bench/out/registry.json", "the report")
	flag.StringVar(&o.dir, "dir", "test/bench/out", "folder whose disk is used, for a fresh folder that is removed at the end")
	flag.StringVar(&o.only, "rows", "", "measure only rows that this regular expression matches; -list shows them")
	flag.IntVar(&o.repeat, "repeat", 5, "measurements of which the median is taken")
	flag.BoolVar(&o.merge, "merge", false, "keep the report's rows that are not measured now")
	clients := flag.String("clients", "1,16", "numbers of clients")
	mib := flag.Int64("layer", 1024, "size of the layer in MiB; with several clients each pushes an equal part of it as a layer of its own, and each pulls the whole")
	flag.IntVar(&o.images, "images", 1000, "images of a push")
	flag.IntVar(&o.names, "names", 10_000, "tags and repositories of a list")
	list := flag.Bool("list", false, "print the rows' names and end")
	flag.Parse()
	if *list {
		for _, r := range rows {
			fmt.Println(r.name)
		}
		return nil
	}
	o.layer = *mib << 20
	for s := range strings.SplitSeq(*clients, ",") {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			return fmt.Errorf("-clients %q: want numbers like 1,16", *clients)
		}
		o.clients = append(o.clients, n)
	}
	only, err := regexp.Compile(o.only)
	if err != nil {
		return fmt.Errorf("-rows: %w", err)
	}
	if o.repeat < 1 || o.images < 1 || o.names < 1 || o.layer < 1 {
		return errors.New("-repeat, -images, -names and -layer must be positive")
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	return measureAll(ctx, o, only)
}

// measureAll measures the rows that match only, and writes the report.
func measureAll(ctx context.Context, o options, only *regexp.Regexp) error {
	if err := os.MkdirAll(o.dir, 0o755); err != nil {
		return err
	}
	dir, err := os.MkdirTemp(o.dir, "registry-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.dir, err = filepath.Abs(dir); err != nil {
		return err
	}
	var out []report.Row
	var failed error // the rows before are shown all the same: they took long
	peaks := peaks{}
	for _, r := range rows {
		if !only.MatchString(r.name) {
			continue
		}
		times, err := measure(ctx, o, r, peaks)
		if err != nil {
			failed = fmt.Errorf("%s: %w", r.name, err)
			break
		}
		for _, n := range o.clients {
			out = append(out, ratios(o, r, n, times[n])...)
		}
	}
	out = append(out, peaks.rows()...)
	if o.merge {
		if out, err = merged(o.out, out); err != nil {
			return errors.Join(failed, err)
		}
	}
	return errors.Join(failed, report.Table(os.Stdout, out), report.WriteFile(o.out, out))
}

// merged is the rows of the report at path with now's in their place.
func merged(path string, now []report.Row) ([]report.Row, error) {
	old, err := report.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	key := func(r report.Row) string { return r.Row + fmt.Sprint(r.Params) }
	for _, r := range now {
		i := slices.IndexFunc(old, func(o report.Row) bool { return key(o) == key(r) })
		switch {
		case i < 0:
			old = append(old, r)
		case r.Row != rowMemory || r.Value > old[i].Value: // a peak is of all that was measured
			old[i] = r
		}
	}
	return old, nil
}

// ratios turns times into rows, one for each number of replicas.
func ratios(o options, r row, clients int, times map[string][]float64) (out []report.Row) {
	base := report.Median(times[rival])
	for _, k := range []struct {
		name     string
		replicas int
	}{{oneOrigin, 1}, {twoOrigins, 2}} {
		mine := report.Median(times[k.name])
		params := map[string]any{"clients": clients, "replicas": k.replicas}
		maps.Copy(params, r.params(o, clients))
		beside := map[string]any{
			"kraken_s": mine, "docker_registry_s": base, "kraken_spread_s": spread(times[k.name]), "docker_registry_spread_s": spread(times[rival]), "runs": len(times[rival]),
		}
		switch {
		case k.replicas == 1:
			out = append(out, report.AtMost(r.name, params, mine/base, unit, oneReplica, beside))
		case r.push:
			out = append(out, report.AtMost(r.name, params, mine/base, unit, twoReplicasPushes, beside))
		default:
			out = append(out, report.Plain(r.name, params, mine/base, unit, beside))
		}
	}
	if r.tls {
		out = append(out, besideTLS(r, clients, r.params(o, clients), times))
	}
	return out
}

// besideTLS is what TLS adds to the time of a row.
func besideTLS(r row, clients int, params map[string]any, times map[string][]float64) report.Row {
	with, without := report.Median(times[twoOverTLS]), report.Median(times[twoOrigins])
	all := map[string]any{"clients": clients, "replicas": 2}
	maps.Copy(all, params)
	beside := map[string]any{"tls_s": with, "plain_s": without, "tls_spread_s": spread(times[twoOverTLS]), "plain_spread_s": spread(times[twoOrigins]), "runs": len(times[twoOrigins])}
	if r.push {
		return report.AtMost(r.name+" over TLS", all, with/without, "x plain", overTLS, beside)
	}
	return report.Plain(r.name+" over TLS", all, with/without, "x plain", beside)
}

const unit = "x docker-registry's time"

// spread is the shortest and the longest time.
func spread(vs []float64) string { return fmt.Sprintf("%.3f..%.3f", slices.Min(vs), slices.Max(vs)) }
