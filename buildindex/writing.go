package buildindex

import (
	"maps"
	"sync"
	"time"

	"kraken/proto/cluster"
)

// settled is for how long the records of a change are remembered after it has ended, at least.
const settled = time.Minute

// writing are the changes that this process makes, or has just made. What origins say of these is no news: the change
// may yet be refused. It is safe for concurrent use.
type writing struct {
	mu    sync.Mutex
	by    map[recordID]time.Time // when the change has ended; zero while it is under way
	limit int                    // from how many on those that have settled are forgotten
}

// recordID tells a record from all others.
type recordID struct {
	key        string // cluster.NameKey
	generation int64
}

func idOf(r cluster.NameRecord) recordID { return recordID{cluster.NameKey(r), r.Generation} }

func (w *writing) begin(rs []cluster.NameRecord) { w.note(rs, time.Time{}) }

func (w *writing) end(rs []cluster.NameRecord) { w.note(rs, time.Now()) }

func (w *writing) note(rs []cluster.NameRecord, ended time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.by == nil {
		w.by = map[recordID]time.Time{}
	}
	for _, r := range rs {
		w.by[idOf(r)] = ended
	}
	if len(w.by) >= w.limit {
		w.forget()
		w.limit = max(1000, 2*len(w.by))
	}
}

// has reports whether the change of a record is under way, or has not been forgotten since it ended.
func (w *writing) has(r cluster.NameRecord) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	_, ok := w.by[idOf(r)]
	return ok
}

// prune forgets what has settled. A look at what origins keep begins with it.
func (w *writing) prune() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.forget()
}

// forget drops what has settled. The lock is held.
func (w *writing) forget() {
	maps.DeleteFunc(w.by, func(_ recordID, ended time.Time) bool { return !ended.IsZero() && time.Since(ended) >= settled })
}
