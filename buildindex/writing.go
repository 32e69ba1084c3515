package buildindex

import (
	"maps"
	"sync"
	"time"

	"kraken/proto/cluster"
)

// settled is for how long the records of a change are remembered after it has ended: a look at what origins keep takes
// less.
const settled = time.Minute

// writing are the changes that this process makes, or has just made. What origins say of these is no news: the change
// may yet be refused. It is safe for concurrent use.
type writing struct {
	mu    sync.Mutex
	now   map[int64]bool      // generations of those under way
	ended map[int64]time.Time // and of those that have ended, when; older ones are forgotten
}

func (w *writing) begin(rs []cluster.NameRecord) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.now == nil {
		w.now, w.ended = map[int64]bool{}, map[int64]time.Time{}
	}
	for _, r := range rs {
		w.now[r.Generation] = true
	}
}

func (w *writing) end(rs []cluster.NameRecord) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, r := range rs {
		delete(w.now, r.Generation)
		w.ended[r.Generation] = time.Now()
	}
}

// has reports whether a change of this generation is under way, or has ended less than settled ago.
func (w *writing) has(generation int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	at, ended := w.ended[generation]
	return w.now[generation] || ended && time.Since(at) < settled
}

// prune forgets what has settled.
func (w *writing) prune() {
	w.mu.Lock()
	defer w.mu.Unlock()
	maps.DeleteFunc(w.ended, func(_ int64, at time.Time) bool { return time.Since(at) >= settled })
}
