package buildindex

import (
	"sync"

	"kraken/proto/cluster"
)

// metaHearing is set once SQL may have names from origins' records although no bucket was read.
const metaHearing = "hearing"

// unproven are names of which SQL may have something older than the bucket. An origin that was away when the others
// forgot a record still has it, and without the bucket nothing tells such a record from one that was never published.
type unproven struct {
	mu    sync.Mutex
	all   bool                  // an earlier process has begun to restore
	names map[cluster.Name]bool // that came from records
	later map[cluster.Name]bool // of which a record can't be read now: not even the bucket knows better
}

// add notes what a record says that SQL has taken over.
func (u *unproven) add(r cluster.NameRecord) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.names == nil {
		u.names = map[cluster.Name]bool{}
	}
	for _, c := range r.Changes() {
		u.names[c.Name] = true
		delete(u.later, c.Name)
	}
}

// has reports whether what SQL has of a name counts only once the bucket was asked.
func (u *unproven) has(n cluster.Name) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.all || u.names[n]
}

// clear forgets all but what can't be read now, when SQL has what the buckets have.
func (u *unproven) clear() {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.all, u.names = false, nil
}

// isLater reports whether a record of a name is known that can't be taken over now.
func (u *unproven) isLater(n cluster.Name) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.later[n]
}

// setLater notes the records of a round that can't be read now. With all, no origin was left out, and others can be
// read, or have gone.
func (u *unproven) setLater(rs []cluster.NameRecord, all bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if all || u.later == nil {
		u.later = map[cluster.Name]bool{}
	}
	for _, r := range rs {
		for _, c := range r.Changes() {
			u.later[c.Name] = true
		}
	}
}
