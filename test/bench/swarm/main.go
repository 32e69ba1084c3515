// Command swarm measures pulls through the swarm against the physical limit: on shaped links between network
// namespaces, and on loopback beside a plain HTTP server and the bare BitTorrent library. It needs root and Linux; it
// makes everything that it uses and removes it.
//
// Rows that begin with mirror- pull from a registry outside the cluster, on a node of its own.
//
// The processes are the shipped binaries as deploy/devcluster lays them out, with one origin, a folder as bucket, no
// peers but Kraken's and, where a row says so, the speed of the link. Every time is a ratio to the lower bound max(F/u,
// F/min d, N·F/(u + Σu_i)) at the link's nominal rate: what Ethernet, IP and TCP add (4.4 %) is part of what is
// measured.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"kraken/test/bench/report"
)

// bench is what all rows share.
type bench struct {
	bin    string // folder of the binaries
	out    string
	repeat int
	rows   []report.Row
}

// section is a group of rows that are measured together; it is chosen by its name.
type section struct {
	name string
	what string
	run  func(*bench, context.Context) error
}

var sections = []section{
	{"shaped-4", "4 agents on links of 25 Mbit/s, told the rate", shaped(4, 25, true)},
	{"shaped-8", "8 agents", shaped(8, 25, true)},
	{"shaped-16", "16 agents", shaped(16, 25, true)},
	{"shaped-32", "32 agents on links of 10 Mbit/s", shaped(32, 10, true)},
	{"shaped-24-slow", "24 agents on links of 2 Mbit/s", slowShaped(24, 2)},
	{"untold-4", "4 agents that are not told the rate", shaped(4, 25, false)},
	{"untold-8", "8 agents that are not told the rate", shaped(8, 25, false)},
	{"untold-16", "16 agents that are not told the rate", shaped(16, 25, false)},
	{"two-blobs", "two blobs at once", twoBlobs},
	{"arrivals", "agents arrive one each half second", arrivals},
	{"kill-third", "a third of the agents is killed midway", killThird},
	{"kill-origin", "the origin is killed after it sent one copy", killOrigin},
	{"cpu-1", "CPU of a GiB delivered, one agent", cpuRow(1)},
	{"cpu-4", "CPU of a GiB delivered, four agents", cpuRow(4)},
	{"tls-cpu-4", "CPU of a GiB delivered to four agents with TLS, beside without", tlsCPU(4)},
	{"tls-links-4", "4 agents on links of 25 Mbit/s with TLS, beside without", tlsShaped(4, 25)},
	{"tls-links-8", "8 agents with TLS, beside without", tlsShaped(8, 25)},
	{"first-byte", "time to first byte of 1 GiB", firstByte},
	{"small", "blobs of 10 KiB", small},
	{"memory-idle", "an agent with 10,000 cached blobs", memoryIdle},
	{"memory-pull", "an agent that pulls 4 GiB", memoryPull},
	{"mirror-image", "16 agents pull an image of 10 layers from an upstream", mirrorImage(16)},
	{"mirror-8", "8 agents want a blob of an upstream, all links of 25 Mbit/s", mirrorCrowd(8, 25, 64*mib, 3)},
	{"mirror-first", "first pull of 1 GiB from an upstream at 100 Mbit/s, beside a direct one", mirrorFirst(100, 1<<30)},
	{"tracker", "announces a second on one core, bytes a pair", tracker},
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	var err error
	if task := os.Getenv(childEnv); task != "" {
		err = runChild(task)
	} else {
		err = run(ctx)
	}
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench-swarm:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	b := &bench{}
	pattern := flag.String("rows", ".", "regular expression: sections to measure")
	list := flag.Bool("list", false, "list the sections and exit")
	flag.StringVar(&b.bin, "bin", "bin", "folder of the binaries")
	flag.StringVar(&b.out, "out", "test/bench/out", "folder of swarm.json and the drawings")
	name := flag.String("name", "swarm", "of the file of results, without .json")
	flag.IntVar(&b.repeat, "repeat", 3, "measurements of each row, of which the median counts")
	flag.Usage = func() {
		fmt.Fprint(flag.CommandLine.Output(), "bench-swarm measures the sections that --list names, about two minutes each, in network namespaces and on loopback. It needs root,\n"+
			"and the binaries of `make build`. What it finds it prints, and keeps in the folder of --out.\n")
		flag.PrintDefaults()
	}
	flag.Parse()
	if *list {
		for _, s := range sections {
			fmt.Printf("%-14s %s\n", s.name, s.what)
		}
		return nil
	}
	chosen, err := choose(*pattern, flag.Args())
	if err != nil {
		return err
	}
	if b.repeat < 1 {
		return errors.New("--repeat must be positive")
	}
	if os.Geteuid() != 0 {
		return errors.New("network namespaces need root")
	}
	if b.bin, err = filepath.Abs(b.bin); err != nil {
		return err
	}
	var errs []error
	for _, s := range chosen {
		if ctx.Err() != nil {
			break
		}
		began := time.Now()
		fmt.Fprintf(os.Stderr, "%s: %s\n", s.name, s.what)
		if err := s.run(b, ctx); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.name, err))
			fmt.Fprintf(os.Stderr, "  FAILED: %v\n", err)
		}
		fmt.Fprintf(os.Stderr, "  %s in all\n", time.Since(began).Round(time.Second))
	}
	b.compareSizes()
	return errors.Join(append(errs, report.Table(os.Stdout, b.rows), report.WriteFile(filepath.Join(b.out, *name+".json"), b.rows), context.Cause(ctx))...)
}

// choose gives the sections whose names begin with what the pattern matches. What is no option is refused: whoever
// forgets --rows would measure everything, for half an hour.
func choose(pattern string, args []string) ([]section, error) {
	if len(args) > 0 {
		return nil, fmt.Errorf("%q is no option; sections are chosen with --rows", args[0])
	}
	re, err := regexp.Compile("^(" + pattern + ")")
	if err != nil {
		return nil, fmt.Errorf("--rows: %w", err)
	}
	var out []section
	for _, s := range sections {
		if re.MatchString(s.name) {
			out = append(out, s)
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("--rows %q matches none of the sections that --list names", pattern)
	}
	return out, nil
}

func (b *bench) add(rows ...report.Row) {
	for _, r := range rows {
		fmt.Fprintf(os.Stderr, "  %s %v: %.3f %s (goal %s)\n", r.Row, r.Params, r.Value, r.Unit, r.Goal)
	}
	b.rows = append(b.rows, rows...)
}

// compareSizes adds how the time of 32 agents compares with that of 4, both as ratios to their bounds.
func (b *bench) compareSizes() {
	last := map[string]float64{}
	for _, r := range b.rows {
		if strings.HasPrefix(r.Row, "shaped") && strings.HasSuffix(r.Row, "last agent") {
			last[fmt.Sprint(r.Params["agents"])] = r.Value
		}
	}
	if last["4"] > 0 && last["32"] > 0 {
		b.add(report.AtMost("32 agents beside 4", nil, last["32"]/last["4"], "x", 1.10, nil))
	}
}
