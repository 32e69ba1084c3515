package sim

import (
	"flag"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var (
	seedFlag       = flag.Uint64("seed", 0, "run this seed alone, and print its history")
	seedsFlag      = flag.Int("seeds", 10, "how many seeds to run")
	firstFlag      = flag.Uint64("first", 1, "the first seed")
	crashSeedsFlag = flag.Int("crashes", 1, "how many power losses the store has at each call of its file system")
	twinsFlag      = flag.Bool("twins", false, "run only those seeds that have a second build-index")
	mostFlag       = flag.Int("most", 5, "how many failing seeds end the test")
	shrinkFlag     = flag.Int("shrink", 0, "how many more runs may be spent on each failing plan to make it smaller")
	logFlag        = flag.String("log", "", "level of what the roles log into histories: debug, info, warn; default none")
)

// profile is how plans are made. What is known not to hold is left out of them by its Without.
var profile = Profile{Epochs: 2, Faults: 26, Ops: 14, Length: 30 * time.Second}

func TestMain(m *testing.M) {
	flag.Parse()
	runtime.GOMAXPROCS(1)
	debug.SetGCPercent(400) // there is memory, and one processor
	os.Exit(m.Run())
}

// level is the level of what roles log.
func level() slog.Level {
	l := slog.Level(100)
	if *logFlag != "" {
		if err := l.UnmarshalText([]byte(*logFlag)); err != nil {
			panic(err)
		}
	}
	return l
}

// run runs a plan in a bubble, with a watch on its real time.
func run(t *testing.T, p Plan) (r Result) {
	t.Helper()
	var w watch
	defer w.begin(fmt.Sprint("seed ", p.Seed))()
	dir := memoryDir(t)
	now := time.Now()
	synctest.Test(t, func(*testing.T) {
		defer w.tick(now)()
		r = Run(p, dir, level(), now)
	})
	if err := os.RemoveAll(dir); err != nil {
		t.Error(err)
	}
	return r
}

// watch ends the process when virtual time stands still for two minutes of real time.
type watch struct{ ticks atomic.Int64 }

// begin is called outside of the bubble.
func (w *watch) begin(what string) (stop func()) {
	stopped := make(chan struct{})
	go func() {
		t := time.NewTicker(2 * time.Minute)
		defer t.Stop()
		last := int64(-1)
		for {
			select {
			case <-stopped:
				return
			case <-t.C:
			}
			if now := w.ticks.Load(); now != last {
				last = now
				continue
			}
			fmt.Fprintf(os.Stderr, "%s hangs: virtual time does not go on\n", what)
			_ = pprof.Lookup("goroutine").WriteTo(os.Stderr, 2)
			os.Exit(2)
		}
	}()
	return func() { close(stopped) }
}

// tick counts virtual time in the bubble, in steps of 10 s, from a time until it is stopped.
func (w *watch) tick(from time.Time) (stop func()) {
	stopped := make(chan struct{})
	go func() {
		select {
		case <-stopped:
			return
		case <-time.After(time.Until(from)): // the bubble's clock begins years ago
		}
		t := time.NewTicker(10 * time.Second)
		defer t.Stop()
		for {
			select {
			case <-stopped:
				return
			case <-t.C:
				w.ticks.Add(1)
			}
		}
	}()
	return func() { close(stopped) }
}

// memoryDir is a folder in memory where there is one.
func memoryDir(t *testing.T) string {
	t.Helper()
	base := "/dev/shm"
	if _, err := os.Stat(base); err != nil {
		base = t.TempDir()
	}
	dir, err := os.MkdirTemp(base, "kraken-sim-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestSeeds(t *testing.T) {
	if *seedFlag != 0 {
		r := run(t, profile.Generate(*seedFlag))
		fmt.Println(r.Plan)
		fmt.Println(r.History)
		report(t, r)
		return
	}
	failed := 0
	for i, ran := uint64(0), 0; ran < *seedsFlag; i++ {
		p := profile.Generate(*firstFlag + i)
		if *twinsFlag && !p.Twin {
			continue
		}
		if ran++; ran%50 == 0 {
			t.Logf("%d seeds before %d, %d failed", ran-1, p.Seed, failed)
		}
		if r := run(t, p); len(r.Violations) > 0 {
			report(t, r)
			if failed++; failed == *mostFlag {
				t.Fatalf("and so on: seed %d was the last", p.Seed)
			}
		}
	}
}

// report fails the test with what a run found, the smallest plan that finds it, and its history.
func report(t *testing.T, r Result) {
	t.Helper()
	for i, v := range r.Violations {
		if i == 6 {
			t.Errorf("seed %d: and %d more", r.Plan.Seed, len(r.Violations)-i)
			break
		}
		t.Errorf("seed %d: %s", r.Plan.Seed, v)
	}
	if *shrinkFlag == 0 {
		t.Logf("history:\n%s%s", r.Plan, r.History)
		return
	}
	small := Shrink(r, *shrinkFlag, func(p Plan) Result { return run(t, p) })
	t.Logf("made smaller:\n%s%s", small.Plan, small.History)
}
