package cluster

import (
	"sync"
	"time"
)

// Rereads notices who reads the same thing again right after reading all of it: a container runtime that got a blob
// whose digest is wrong asks for it once more, and nobody else tells of the mistake. It is safe for concurrent use; its
// memory is bounded.
type Rereads struct {
	within time.Duration
	most   int

	mu     sync.Mutex
	fresh  map[string]time.Time
	old    map[string]time.Time // those of the time before the last turn
	turned time.Time
}

// NewRereads remembers what was read for at least within and at most twice that, and at most 2*most things.
func NewRereads(within time.Duration, most int) *Rereads {
	return &Rereads{within: within, most: most, fresh: map[string]time.Time{}, turned: time.Now()}
}

// Read notes that a reading of all of key has ended.
func (r *Rereads) Read(key string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := time.Now()
	if now.Sub(r.turned) > r.within || len(r.fresh) >= r.most {
		r.old, r.fresh, r.turned = r.fresh, map[string]time.Time{}, now
	}
	r.fresh[key] = now
}

// Again reports whether a reading of all of key has ended within the time, and forgets it: of each pair of readings the
// second is told once.
func (r *Rereads) Again(key string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	at, ok := r.fresh[key]
	if !ok {
		at, ok = r.old[key]
	}
	delete(r.fresh, key)
	delete(r.old, key)
	return ok && time.Since(at) <= r.within
}
