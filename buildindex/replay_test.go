package buildindex

import (
	"testing"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// A deletion that was signed once, and comes back after its name was pushed again, deletes nothing at a restoration:
// neither one that an origin kept which was away, nor one that somebody kept who could read it.
func TestOldDeletionComesBack(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	r.durable(true)
	a := r.put("v", "one")
	r.delete(registry.Reference{Digest: a})
	var old []cluster.NameRecord
	r.origins[0].set(func() {
		for _, rec := range r.origins[0].names {
			if rec.Change().Act == cluster.Delete {
				old = append(old, rec)
			}
		}
	})
	if len(old) == 0 {
		t.Fatal("no deletion is kept")
	}
	if left, err := r.x.drain(r.Context()); err != nil || left {
		t.Fatal(left, err)
	}
	r.put("v", "one")
	if left, err := r.x.drain(r.Context()); err != nil || left {
		t.Fatal(left, err)
	}
	for _, rec := range old {
		r.plant(rec)
	}
	r.lose()
	r.wantTag("v", a)
	r.wantManifest(a, true)
	// Nor in the bucket, whatever the deletion's place in the outbox has done.
	if left, err := r.x.drain(r.Context()); err != nil || left {
		t.Fatal(left, err)
	}
	for _, o := range r.origins {
		o.set(func() { clear(o.names) })
	}
	r.start("third.db")
	r.must(r.x.fill(r.Context()))
	r.wantTag("v", a)
	r.wantManifest(a, true)
}
