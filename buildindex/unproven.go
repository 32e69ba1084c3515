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
	done  bool                   // SQL has what the buckets have
	all   bool                   // an earlier process has begun to restore
	names map[cluster.Name]bool  // that came from records
	later map[cluster.Name]int64 // of which a record of this generation can't be read now: not even the bucket knows better
}

// add notes what a record says that SQL has taken over.
func (u *unproven) add(r cluster.NameRecord) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.done {
		return
	}
	if u.names == nil {
		u.names = map[cluster.Name]bool{}
	}
	for _, c := range r.Changes() {
		u.names[c.Name] = true
	}
}

// adopted notes that SQL has what a record says.
func (u *unproven) adopted(r cluster.NameRecord) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.settle(r)
}

// written notes that SQL has what this process has written, which nothing of before wins over.
func (u *unproven) written(r cluster.NameRecord) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.settle(r)
	for _, c := range r.Changes() {
		delete(u.names, c.Name)
	}
}

// settle forgets what could not be read of the names of a record, but for what is newer. The caller holds u.mu.
func (u *unproven) settle(r cluster.NameRecord) {
	for _, c := range r.Changes() {
		if at, ok := u.later[c.Name]; ok && at <= c.Generation {
			delete(u.later, c.Name)
		}
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
	u.done, u.all, u.names = true, false, nil
}

// laterAt returns the generation of a record of a name that can't be taken over now, 0 where there is none.
func (u *unproven) laterAt(n cluster.Name) int64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.later[n]
}

// setLater notes the changes of a round that can't be read now. With all, no origin was left out, and others can be
// read, or have gone.
func (u *unproven) setLater(cs []cluster.Change, all bool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if all || u.later == nil {
		u.later = map[cluster.Name]int64{}
	}
	for _, c := range cs {
		u.later[c.Name] = max(u.later[c.Name], c.Generation)
	}
}
