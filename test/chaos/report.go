package chaos

import (
	"fmt"
	"io"
	"slices"
	"sync"
	"text/tabwriter"
	"time"
)

// report counts requests by the fault that was there when they began, or came while they were under way.
type report struct {
	mu   sync.Mutex
	now  *fault
	rows map[string]*row
}

// row is what was seen of one kind of fault at one role.
type row struct {
	single   bool
	faults   int
	requests int
	failed   map[string]int // by what was asked
	first    string         // error of the first that failed
	slowest  time.Duration
	slow     string // what was slowest
	ready    []time.Duration
}

const calm = "none"

func newReport() *report { return &report{rows: map[string]*row{calm: newRow(true)}} }

func newRow(single bool) *row { return &row{single: single, failed: map[string]int{}} }

// begin says that f happens; a nil f, that all is well.
func (r *report) begin(f *fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.now = f
	if f != nil {
		r.row(f).faults++
	}
}

func (r *report) row(f *fault) *row {
	key := calm
	if f != nil {
		key = f.part.Role + " " + f.name
	}
	if r.rows[key] == nil {
		r.rows[key] = newRow(f.single())
	}
	return r.rows[key]
}

// request notes the first try of one request, which has just ended.
func (r *report) request(what string, took time.Duration, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.row(r.now)
	w.requests++
	if err != nil {
		if w.failed[what]++; w.first == "" {
			w.first = fmt.Sprintf("%s: %.200v", what, err)
		}
		return
	}
	if took > w.slowest {
		w.slowest, w.slow = took, what
	}
}

// ready notes how long the component of f took from its start until it was ready.
func (r *report) ready(f *fault, took time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.row(f)
	w.ready = append(w.ready, took)
}

func (w *row) failures() int {
	n := 0
	for _, k := range w.failed {
		n += k
	}
	return n
}

// table writes a row for each kind of fault.
func (r *report) table(out io.Writer) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	t := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(t, "fault\tn\trequests\tfailed\tshare\tslowest that succeeded\tready: median, last\tfirst failure")
	var keys []string
	for k := range r.rows {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	for _, k := range keys {
		w := r.rows[k]
		median, last := "-", "-"
		if len(w.ready) > 0 {
			slices.Sort(w.ready)
			median, last = seconds(w.ready[len(w.ready)/2]), seconds(w.ready[len(w.ready)-1])
		}
		share := 100 * float64(w.failures()) / float64(max(1, w.requests))
		fmt.Fprintf(t, "%s\t%d\t%d\t%d\t%.2f %%\t%s %s\t%s, %s\t%s\n", k, w.faults, w.requests, w.failures(), share, seconds(w.slowest), w.slow, median, last, w.first)
	}
	return t.Flush()
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2fs", d.Seconds()) }

// unmet returns where the goals were missed: a request failed because of a single part that others stand in for, or a
// part was not ready in time.
func (r *report) unmet(readyWithin time.Duration) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for k, w := range r.rows {
		if n := w.failures(); w.single && n > 0 {
			out = append(out, fmt.Sprintf("%s: %d of %d requests failed, the first %s", k, n, w.requests, w.first))
		}
		for _, d := range w.ready {
			if d > readyWithin {
				out = append(out, fmt.Sprintf("%s: ready after %s", k, seconds(d)))
			}
		}
	}
	slices.Sort(out)
	return out
}
