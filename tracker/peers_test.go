package tracker

import (
	"context"
	"net/netip"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/config"
)

func TestTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const interval = 10 * time.Second
		s := newStore(interval, 30, wide)
		stock := nobody(3)
		stock.stock = true
		s.say(t, nobody(1), leeching())
		s.say(t, nobody(2), seeding())
		s.say(t, stock, leeching())
		given := func() int { return len(s.handout(theBlob, asking{id: nobody(9).id}, 40).peers) }
		if n := given(); n != 3 {
			t.Fatalf("%d peers, want 3", n)
		}
		time.Sleep(3 * interval)
		s.say(t, nobody(2), seeding())
		if n := given(); n != 3 {
			t.Errorf("after three intervals %d peers, want 3", n)
		}
		time.Sleep(time.Nanosecond)
		if n := given(); n != 2 {
			t.Errorf("right after three intervals %d peers are given, want 2: one was not heard of", n)
		}
		if _, peers, pairs := s.counts(); peers != 3 || pairs != 3 {
			t.Errorf("%d peers and %d pairs before the sweep", peers, pairs)
		}
		s.sweep()
		if _, peers, pairs := s.counts(); peers != 2 || pairs != 2 {
			t.Errorf("%d peers and %d pairs after the sweep, want 2 and 2", peers, pairs)
		}
		time.Sleep(stockTTL)
		s.sweep()
		if swarms, peers, pairs := s.counts(); swarms+peers+pairs != 0 || len(s.byAddr)+len(s.byHash) != 0 {
			t.Errorf("%d swarms, %d peers, %d pairs are left of nothing", swarms, peers, pairs)
		}
	})
}

// TestSweepOfMany: what expires together goes together, and who is still there is given as before; the number of one
// that is gone is another's, and none of its blobs are.
func TestSweepOfMany(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const interval = 10 * time.Second
		s := newStore(interval, 30, wide)
		for i := range 300 {
			s.say(t, nobody(i), leeching(), announce.BlobState{Digest: digest.FromString("2"), Size: 1})
			s.say(t, nobody(1000+i), seeding())
		}
		time.Sleep(2 * interval)
		for i := range 100 {
			s.say(t, nobody(3*i), leeching())
			s.say(t, nobody(1000+3*i), seeding())
		}
		time.Sleep(2 * interval)
		s.sweep()
		if swarms, peers, pairs := s.counts(); swarms != 1 || peers != 200 || pairs != 200 {
			t.Errorf("%d swarms, %d peers, %d pairs are left, want 1, 200, 200", swarms, peers, pairs)
		}
		for i := range 200 {
			s.say(t, nobody(2000+i), announce.BlobState{Digest: digest.FromString("3")})
		}
		if n := len(s.roster.peers); n != 600 {
			t.Errorf("room for %d peers, want 600: numbers are given again", n)
		}
		fresh := newStore(interval, 30, wide)
		for i := range 100 {
			fresh.say(t, nobody(3*i), leeching())
			fresh.say(t, nobody(1000+3*i), seeding())
		}
		for i := range 100 {
			id := nobody(3 * i).id
			if got, want := ids(s.handout(theBlob, asking{id: id}, 40)), ids(fresh.handout(theBlob, asking{id: id}, 40)); !slices.Equal(got, want) {
				t.Fatalf("%s is given %v, want %v", id, got, want)
			}
		}
		time.Sleep(4 * interval)
		s.sweep()
		if swarms, peers, pairs := s.counts(); swarms+peers+pairs != 0 {
			t.Errorf("%d swarms, %d peers, %d pairs are left of nothing", swarms, peers, pairs)
		}
	})
}

// TestSeenIsNeverEarlier: an entry lives its whole time, whatever moment it was seen at.
func TestSeenIsNeverEarlier(t *testing.T) {
	for _, at := range []time.Duration{0, 1, time.Millisecond, 99 * time.Millisecond, 100 * time.Millisecond, time.Hour + 1, 5 * 365 * 24 * time.Hour} {
		if got := tickOf(moment(at)).moment(); got < moment(at) || got-moment(at) >= tickLength {
			t.Errorf("seen at %s is kept as %s", at, time.Duration(got))
		}
	}
}

// TestSweepRuns: memory is freed without anybody asking.
func TestSweepRuns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tr := &Tracker{cfg: Config{Interval: config.Duration(10 * time.Second)}, store: newStore(10*time.Second, 30, wide)}
		tr.store.say(t, nobody(1), seeding())
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error)
		go func() { done <- tr.sweep(ctx) }()
		time.Sleep(41 * time.Second)
		synctest.Wait()
		if swarms, peers, _ := tr.store.counts(); swarms+peers != 0 {
			t.Errorf("%d swarms and %d peers are left", swarms, peers)
		}
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

func TestEvents(t *testing.T) {
	s := newStore(time.Minute, 30, wide)
	see := func(step string, seeds, leechers int) {
		t.Helper()
		if h := s.handout(theBlob, asking{id: nobody(9).id}, 40); h.seeds != seeds || h.leechers != leechers {
			t.Errorf("%s: %d seeds, %d leechers, want %d, %d", step, h.seeds, h.leechers, seeds, leechers)
		}
	}
	with := func(e announce.Event, left int64) announce.BlobState {
		return announce.BlobState{Digest: theBlob, Event: e, Size: 100, Left: left}
	}
	s.say(t, nobody(1), with(announce.EventStarted, -1))
	see("started", 0, 1)
	s.say(t, nobody(1), with(announce.EventNone, 50))
	see("half", 0, 1)
	s.say(t, nobody(1), with(announce.EventCompleted, 100))
	see("completed, whatever it says is left", 1, 0)
	s.say(t, nobody(1), with(announce.EventNone, 0))
	see("seeding", 1, 0)
	s.say(t, nobody(1), with(announce.EventStarted, 100))
	see("lost it and began again", 0, 1)
	s.say(t, nobody(1), with(announce.EventStopped, 100))
	see("stopped", 0, 0)
	s.say(t, nobody(1), with(announce.EventStopped, 100))
	see("stopped twice", 0, 0)
	if swarms, _, pairs := s.counts(); swarms+pairs != 0 {
		t.Errorf("%d swarms and %d pairs are left", swarms, pairs)
	}
	s.say(t, nobody(1), with(announce.EventStopped, 0), with(announce.EventCompleted, 0))
	see("evicted and fetched again within one announce", 1, 0)
}

// TestBounds: whatever is announced, no more is kept than is allowed, and what is kept is handed out.
func TestBounds(t *testing.T) {
	s := newStore(time.Minute, 30, bounded(func(b *bounds) { b.peers, b.pairs, b.swarm = 10, 12, 5 }))
	states := []announce.BlobState{seeding(), {Digest: digest.FromString("2")}, {Digest: digest.FromString("3")}}
	refused := 0
	for i := range 20 {
		refused += s.register(nobody(i), states).refused
	}
	swarms, peers, pairs := s.counts()
	if swarms != 3 || peers != 10 || pairs != 12 {
		t.Errorf("%d swarms, %d peers, %d pairs, want 3, 10 and 12", swarms, peers, pairs)
	}
	if refused != 60-12 {
		t.Errorf("%d refused, want %d", refused, 60-12)
	}
	if n := len(s.handout(theBlob, asking{id: nobody(19).id}, 40).peers); n < 4 || n > 5 {
		t.Errorf("who was refused is given %d peers", n)
	}
	if n := s.register(nobody(0), states).refused; n != 0 {
		t.Errorf("%d of a known peer's states were refused", n)
	}
	s.say(t, nobody(0), announce.BlobState{Digest: theBlob, Event: announce.EventStopped})
	if n := s.register(nobody(9), states[:1]).refused; n != 0 {
		t.Error("a place came free and was not given")
	}
}

// TestRestartedPeer: a node that was killed comes back with another id at the same address. Nobody is sent to the old
// one, and it is not sent to itself.
func TestRestartedPeer(t *testing.T) {
	s := newStore(time.Minute, 30, wide)
	before, after := nobody(1), nobody(2)
	after.addrs, after.source = before.addrs, before.source
	before.key, after.key = keyHashOf("first"), keyHashOf("second")
	s.say(t, before, leeching())
	s.say(t, after, leeching())
	if h := s.handout(theBlob, asking{id: after.id}, 40); len(h.peers) != 0 {
		t.Errorf("it is sent to itself: %v", h.peers)
	}
	if got := ids(s.handout(theBlob, asking{id: nobody(9).id}, 40)); !slices.Equal(got, []announce.PeerID{after.id}) {
		t.Errorf("others are sent to %v", got)
	}
	if snap := s.snapshot(); snap.NodeCount != 1 || snap.Leechers != 1 {
		t.Errorf("the page shows %d nodes, %d leechers", snap.NodeCount, snap.Leechers)
	}
	// The old one was alive after all, at a new address.
	before.addrs, before.source = nobody(3).addrs, nobody(3).source
	s.say(t, before, leeching())
	if n := len(s.handout(theBlob, asking{id: nobody(9).id}, 40).peers); n != 2 {
		t.Errorf("%d peers, want 2", n)
	}
}

func TestFamilies(t *testing.T) {
	s := newStore(time.Minute, 30, wide)
	v6 := netip.MustParseAddrPort("[2001:db8::1]:16062")
	both, none, client := nobody(1), nobody(2), nobody(3)
	both.addrs[1] = v6
	none.addrs[0] = netip.AddrPort{}
	client.stock = true
	s.say(t, both, leeching())
	s.say(t, none, leeching())
	s.say(t, client, leeching())
	// the same client by its other family
	client.addrs = [2]netip.AddrPort{1: netip.MustParseAddrPort("[2001:db8::3]:1")}
	s.say(t, client, leeching())
	h := s.handout(theBlob, asking{id: nobody(9).id}, 40)
	if h.leechers != 3 || len(h.peers) != 2 {
		t.Fatalf("%d of %d leechers are given, want 2 of 3: one can't be dialled", len(h.peers), h.leechers)
	}
	for _, p := range h.peers {
		if !p.addrs[0].IsValid() || !p.addrs[1].IsValid() {
			t.Errorf("%s is given with %v, want both families", p.id, p.addrs)
		}
	}
	both.addrs[1] = netip.AddrPort{} // an agent says all of its addresses every time
	s.say(t, both, leeching())
	if s.byAddr[v6] != nil {
		t.Error("an address that is not announced any more is remembered")
	}
}

func TestLookup(t *testing.T) {
	s := newStore(time.Minute, 30, wide)
	h1, h2 := blob.InfoHash{1}, blob.InfoHash{2}
	s.learn(theBlob, h1, 7) // no such swarm
	if _, _, ok := s.lookup(h1); ok {
		t.Error("a swarm without peers is known")
	}
	s.say(t, nobody(1), announce.BlobState{Digest: theBlob, Left: -1})
	s.learn(theBlob, h1, 7)
	s.learn(theBlob, h2, 8) // the first metainfo was wrong
	if _, _, ok := s.lookup(h1); ok {
		t.Error("the old info-hash is still known")
	}
	if d, size, ok := s.lookup(h2); d != theBlob || size != 8 || !ok {
		t.Errorf("lookup: %s, %d, %v", d, size, ok)
	}
	s.say(t, nobody(1), announce.BlobState{Digest: theBlob, Event: announce.EventStopped})
	if _, _, ok := s.lookup(h2); ok {
		t.Error("the swarm is gone and its info-hash is known")
	}
}

// collect frees what tests before have left, also what pools keep for one collection more.
func collect() {
	runtime.GC()
	runtime.GC()
}

// TestMemory: a pair costs little, be it in few large swarms of those that have the blob or fetch it, or in many of
// usual size.
func TestMemory(t *testing.T) {
	for name, c := range map[string]struct {
		peers, blobs, each int // each peer says that it has, or fetches, as many of the blobs
		left               int64
		most               float64
	}{
		"seeds":         {1000, 200, 200, 0, 32},
		"leechers":      {1000, 200, 200, 1, 128}, // with their places on fifteen circles
		"small swarms":  {200, 2000, 200, 0, 64},
		"small, wanted": {200, 2000, 200, 1, 64},
	} {
		var before, after runtime.MemStats
		collect()
		runtime.ReadMemStats(&before)
		s := newStore(time.Minute, 30, wide)
		for i := range c.peers {
			states := make([]announce.BlobState, c.each)
			for k := range states {
				n := (i*37 + k) % c.blobs
				states[k] = announce.BlobState{Digest: digest.FromBytes([]byte{byte(n), byte(n >> 8)}), Size: 1 << 30, Left: c.left}
			}
			s.say(t, nobody(i), states...)
		}
		collect()
		runtime.ReadMemStats(&after)
		each := (float64(after.HeapAlloc) - float64(before.HeapAlloc)) / float64(c.peers*c.each)
		t.Logf("%s: %.0f bytes a pair", name, each)
		if each <= 0 || each > c.most {
			t.Errorf("%s: %.0f bytes a pair, want some, and at most %.0f", name, each, c.most)
		}
		runtime.KeepAlive(s)
	}
}
