package buildindex

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// A change that one origin alone keeps, since the other was away, is brought to that one when it is back, also by the
// next process, and nobody keeps it once the bucket has it.
func TestNamesAreToppedUp(t *testing.T) {
	for _, restart := range []bool{false, true} {
		t.Run(fmt.Sprintf("restart %t", restart), func(t *testing.T) {
			r := newRig(t)
			r.must(r.x.putLayer(t.Context(), "repo", cluster.Layer{Digest: digest.FromString("a"), Size: 1}))
			for _, o := range r.origins {
				o.set(func() { clear(o.names) })
			}
			away := r.origins[1]
			away.set(func() { away.down = true })
			r.short = true
			r.put("v", "a")
			r.delete(registry.Reference{Tag: "v"})
			kept := r.origins[0].kept()
			if away.kept() != 0 || kept == 0 {
				t.Fatalf("%d and %d records are kept", kept, away.kept())
			}
			r.x.topUpOnce(t.Context())
			away.set(func() { away.down = false })
			if restart {
				r.start("first.db")
				r.must(r.x.fill(t.Context()))
			}
			r.x.topUpOnce(t.Context())
			if n := away.kept(); n != kept {
				t.Errorf("who was away keeps %d of %d records", n, kept)
			}
			if left := r.x.short.all(); len(left) != 0 || r.x.short.bytes != 0 {
				t.Errorf("%d records of %d bytes are still short", len(left), r.x.short.bytes)
			}
			r.durable(true)
			r.must(r.x.fill(t.Context()))
			if left, err := r.x.drain(t.Context()); err != nil || left {
				t.Fatalf("left %v, %v", left, err)
			}
			if n := away.kept() + r.origins[0].kept(); n != 0 {
				t.Errorf("%d records are kept that the bucket has", n)
			}
		})
	}
}

// What is kept for origins that are away is bounded, the newest of a name, and forgotten with it.
func TestShortRecords(t *testing.T) {
	var s short
	record := func(tag string, generation int64, size int) shortRecord {
		return shortRecord{NameRecord: cluster.NameRecord{Repository: "r", Tag: tag, Generation: generation}, raw: make([]byte, size)}
	}
	s.add(record("a", 2, 10))
	s.add(record("a", 1, 10))
	if !s.has(record("a", 2, 0)) || len(s.records) != 1 {
		t.Errorf("an older record took the place of a newer one: %v", s.records)
	}
	s.remove(record("a", 1, 0).NameRecord)
	if !s.has(record("a", 2, 0)) {
		t.Error("the newer one is gone with the older")
	}
	s.add(record("a", 3, maxShort))
	if s.has(record("a", 2, 0)) || s.bytes != 0 {
		t.Errorf("an older one stands for one that is too large: %d bytes", s.bytes)
	}
	for i := range int64(100) {
		s.add(record(string(rune('b'+i)), 1, maxShort/10))
	}
	if len(s.records) > 10 || s.bytes > maxShort {
		t.Errorf("%d records of %d bytes", len(s.records), s.bytes)
	}
}

// A push that waits for the bucket is as old as its request: a deletion that was acknowledged meanwhile wins.
func TestDeletedWhileItWaits(t *testing.T) {
	r := newRig(t)
	r.must(r.x.fill(t.Context()))
	layer := cluster.Layer{Digest: digest.FromString("a"), Size: 1}
	r.must(r.x.putLayer(t.Context(), "repo", layer))
	r.x.keptWait = time.Minute
	before, done := r.x.generation.Load(), make(chan error, 1)
	go func() {
		layer.Copies = 1
		done <- r.x.putLayer(t.Context(), "repo", layer)
	}()
	for limit := time.After(20 * time.Second); r.x.generation.Load() == before; { // until it waits
		select {
		case err := <-done:
			t.Fatalf("the push has ended before it waits: %v", err)
		case <-limit:
			t.Fatal("the push does not come to wait")
		default:
			runtime.Gosched()
		}
	}
	r.must(r.x.deleteLayer(t.Context(), "repo", layer.Digest))
	r.durable(true)
	if err := <-done; err == nil {
		t.Error("the push is acknowledged")
	}
	r.wantLayer(layer.Digest, false)
}
