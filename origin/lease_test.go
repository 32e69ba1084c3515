package origin

import (
	"encoding/json"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// metainfoOf is of a blob with n pieces of zeroes.
func metainfoOf(t testing.TB, n int) *blob.Metainfo {
	t.Helper()
	size := int64(n) * blob.MinPieceLength
	h := blob.NewPieceHasher(size)
	zero := make([]byte, blob.MinPieceLength)
	for range n {
		if _, err := h.Write(zero); err != nil {
			t.Fatal(err)
		}
	}
	m, err := h.Sum(digest.FromString("zeroes"))
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestEachPieceOnceBeforeAnyTwice(t *testing.T) {
	m := metainfoOf(t, 40)
	l := newLeases(8)
	sent := make([]int, 40)
	for range 5 { // five agents with nothing, eight pieces each
		for _, i := range l.hand(m, blob.NewBitmap(40), cluster.LeaseRequest{Max: 8}, 0, 1).Pieces {
			sent[i]++
		}
	}
	if slices.Min(sent) != 1 || slices.Max(sent) != 1 {
		t.Errorf("pieces were sent %v times, want each once", sent)
	}
	if out := l.hand(m, blob.NewBitmap(40), cluster.LeaseRequest{Max: 8}, 0, 1); len(out.Pieces) != 0 || out.RetryAfter <= 0 {
		t.Errorf("everything was sent a moment ago: %+v, want a time to ask again", out)
	}
}

func TestLeastSentComesNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := metainfoOf(t, 12)
		l := newLeases(8)
		first := l.hand(m, blob.NewBitmap(12), cluster.LeaseRequest{Max: 12}, 0, 1).Pieces
		for _, i := range first {
			l.sending(m.Digest, registry.Range{Offset: int64(i) * m.PieceLength(), Length: m.PieceLength()}, m.Size)
		}
		time.Sleep(2 * againAfter)
		have := blob.NewBitmap(12)
		have.Set(3)
		again := l.hand(m, have, cluster.LeaseRequest{Max: 4}, 0, 1).Pieces
		if len(again) != 4 || slices.Contains(again, 3) {
			t.Fatalf("a late agent was handed %v", again)
		}
		for _, i := range again {
			l.sending(m.Digest, registry.Range{Offset: int64(i) * m.PieceLength(), Length: m.PieceLength()}, m.Size)
		}
		time.Sleep(2 * againAfter)
		for _, i := range l.hand(m, blob.NewBitmap(12), cluster.LeaseRequest{Max: 8}, 0, 1).Pieces {
			if slices.Contains(again, i) {
				t.Errorf("piece %d was sent a third time before others a second", i)
			}
		}
	})
}

func TestExpiredLeaseGoesToAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := metainfoOf(t, 4)
		l := newLeases(8)
		l.hand(m, blob.NewBitmap(4), cluster.LeaseRequest{Max: 4}, 0, 1)
		l.sending(m.Digest, registry.Range{Offset: 0, Length: m.PieceLength()}, m.Size) // only piece 0 was fetched
		time.Sleep(leaseFor + time.Second)
		l.hand(m, blob.NewBitmap(4), cluster.LeaseRequest{Max: 3}, 0, 1)
		b := l.blobs[m.Digest]
		if !slices.Equal(b.sent, []uint16{1, 1, 1, 1}) {
			t.Errorf("sent %v: an unused lease counts, or a used one doesn't", b.sent)
		}
	})
}

// Where nothing has come to an agent for a while, it gets what was sent lately, and not all such agents the same.
func TestStalledAgentsGetAnyPiece(t *testing.T) {
	m := metainfoOf(t, 64)
	l := newLeases(8)
	l.hand(m, blob.NewBitmap(64), cluster.LeaseRequest{Max: 64}, 0, 1)
	got := map[int]bool{}
	for range 16 {
		have := blob.NewBitmap(64)
		have.Set(5)
		out := l.hand(m, have, cluster.LeaseRequest{Max: 4, Stalled: true}, 0, 1).Pieces
		if len(out) != 1 || out[0] == 5 {
			t.Fatalf("a stalled agent was handed %v, want a piece that it lacks", out)
		}
		got[out[0]] = true
	}
	if len(got) < 4 {
		t.Errorf("16 stalled agents were handed only the pieces %v", got)
	}
	if out := l.hand(m, blob.NewBitmap(64), cluster.LeaseRequest{Max: 4}, 0, 1).Pieces; len(out) > 0 {
		t.Errorf("%v were sent a moment ago and are sent again to who is not stalled", out)
	}
}

// On a slow uplink what was sent is left to trade for as long as it needs to spread, what the other replica leads with
// is not.
func TestPiecesSpreadSlowlyOnSlowLinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := metainfoOf(t, 8)
		l, x := newLeases(8), newTurns()
		x.rate = 250e3
		l.spread = x.spread
		first := l.hand(m, blob.NewBitmap(8), cluster.LeaseRequest{Max: 8}, 0, 2).Pieces
		for _, i := range first {
			l.sending(m.Digest, registry.Range{Offset: int64(i) * m.PieceLength(), Length: m.PieceLength()}, m.Size)
		}
		time.Sleep(againAfter + time.Millisecond)
		got := l.hand(m, blob.NewBitmap(8), cluster.LeaseRequest{Max: 8, Want: []int{0}}, 0, 2).Pieces
		if !slices.Equal(got, []int{4, 5, 6, 7}) {
			t.Errorf("after %s %v are handed out, want what the other replica leads with and nothing twice", againAfter, got)
		}
		time.Sleep(x.spread(m.PieceLength()))
		if got := l.hand(m, blob.NewBitmap(8), cluster.LeaseRequest{Max: 1, Want: []int{0}}, 0, 2).Pieces; !slices.Equal(got, []int{0}) {
			t.Errorf("%v are handed out to a reader that has waited for piece 0 for long", got)
		}
	})
}

func TestReplicasLeadWithDisjointPieces(t *testing.T) {
	m := metainfoOf(t, 64)
	a, b := newLeases(8), newLeases(8)
	first := a.hand(m, blob.NewBitmap(64), cluster.LeaseRequest{Max: 32}, 0, 2).Pieces
	second := b.hand(m, blob.NewBitmap(64), cluster.LeaseRequest{Max: 32}, 1, 2).Pieces
	for _, i := range first {
		if slices.Contains(second, i) {
			t.Errorf("both replicas lead with piece %d", i)
		}
	}
	if len(first)+len(second) != 64 {
		t.Errorf("%d and %d pieces were handed out", len(first), len(second))
	}
}

func TestReplicaStepsInForAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := metainfoOf(t, 64)
		l := newLeases(8)
		ask := func(want ...int) []int {
			return l.hand(m, blob.NewBitmap(64), cluster.LeaseRequest{Max: 64, Want: want}, 0, 2).Pieces
		}
		if got := ask(); len(got) != 32 {
			t.Errorf("%d pieces at once, want our half", len(got))
		}
		theirs := stripe // the first piece that the other replica leads with
		time.Sleep(leadTime + time.Millisecond)
		if got := ask(theirs); !slices.Equal(got, []int{theirs}) {
			t.Errorf("a reader has waited for piece %d and was handed %v", theirs, got)
		}
		time.Sleep(againAfter + time.Millisecond)
		if got := ask(); len(got) != 64 {
			t.Errorf("%d pieces after a time, want all that were left to others", len(got))
		}
	})
}

// What a reader waits for first of all is left to the replica that leads with it only for a moment, and once: with what
// was sent already the others it waits for trades.
func TestReadersFirstPieceComesSoon(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := metainfoOf(t, 64)
		l := newLeases(8)
		theirs := stripe
		ask := func() []int {
			return l.hand(m, blob.NewBitmap(64), cluster.LeaseRequest{Max: 1, Want: []int{theirs, theirs + 1}}, 0, 2).Pieces
		}
		if got := ask(); slices.Contains(got, theirs) {
			t.Errorf("piece %d was handed out at once, though another replica leads with it", theirs)
		}
		time.Sleep(leadTime + time.Millisecond)
		if got := ask(); !slices.Equal(got, []int{theirs}) {
			t.Errorf("a reader has waited %v for piece %d and was handed %v", leadTime, theirs, got)
		}
		if got := ask(); slices.Contains(got, theirs) {
			t.Errorf("piece %d was sent a moment ago and is sent again", theirs)
		}
	})
}

func TestReadersComeFirst(t *testing.T) {
	m := metainfoOf(t, 64)
	out := newLeases(8).hand(m, blob.NewBitmap(64), cluster.LeaseRequest{Max: 4, Want: []int{50, 51, -7, 1000}}, 0, 1).Pieces
	if !slices.Equal(out[:2], []int{50, 51}) {
		t.Errorf("handed out %v, want what a reader waits for first", out)
	}
}

func TestLeasersAreBounded(t *testing.T) {
	m := metainfoOf(t, 4)
	l := newLeases(2)
	for i := range 3 { // before anything was leased: the first ones may wait for their turn for long
		if in := l.enter(m); in != (i < 2) {
			t.Errorf("agent %d at once: admitted %v, want two and no third", i+1, in)
		}
	}
	l.hand(m, blob.NewBitmap(4), cluster.LeaseRequest{Max: 1}, 0, 1)
	if l.enter(m) {
		t.Error("a third was admitted after the first lease")
	}
	l.leave(m.Digest)
	if !l.enter(m) {
		t.Error("one left, and nobody may enter")
	}
}

// A blob's leases begin with the first one, not with who waits for it: by their age a replica steps in for another.
func TestWaitingIsNotLeasing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := metainfoOf(t, 8)
		l := newLeases(2)
		l.enter(m)
		time.Sleep(2 * againAfter)
		for _, i := range l.hand(m, blob.NewBitmap(8), cluster.LeaseRequest{Max: 8}, 0, 2).Pieces {
			if i >= stripe {
				t.Errorf("piece %d was leased, which the other replica leads with", i)
			}
		}
	})
}

func FuzzLeaseRequest(f *testing.F) {
	m := metainfoOf(f, 20)
	f.Add([]byte(`{"have":"AAAA","want":[1,2,-3,99],"max":5}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		var r cluster.LeaseRequest
		if json.Unmarshal(b, &r) != nil {
			return
		}
		have, err := blob.ParseBitmap(m.NumPieces(), r.Have)
		if err != nil {
			return
		}
		for _, i := range newLeases(1).hand(m, have, r, 0, 2).Pieces {
			if i < 0 || i >= 20 || have.Has(i) {
				t.Errorf("handed out piece %d for %s", i, b)
			}
		}
	})
}

func TestTheOnlyAgentDoesNotWait(t *testing.T) {
	m := metainfoOf(t, 8)
	l := newLeases(8)
	if got := l.hand(m, blob.NewBitmap(8), cluster.LeaseRequest{Max: 8}, 0, 1).Pieces; len(got) != 8 {
		t.Fatalf("an agent that died since was handed %v", got)
	}
	if got := l.hand(m, blob.NewBitmap(8), cluster.LeaseRequest{Max: 8}, 0, 1).Pieces; len(got) != 0 {
		t.Errorf("an agent that may trade was handed %v", got)
	}
	if got := l.hand(m, blob.NewBitmap(8), cluster.LeaseRequest{Max: 3, Want: []int{5}, Alone: true}, 0, 1).Pieces; len(got) != 1 || got[0] != 5 {
		t.Errorf("an agent that knows no other was handed %v, want the piece that it waits for", got)
	}
}

// What was counted of a blob while it came counts when it is whole, and nothing that is counted for another fetch of
// the same digest.
func TestLeasesOfAFetch(t *testing.T) {
	m := metainfoOf(t, 8)
	whole, one, other := newLeases(8), newLeases(8), newLeases(8)
	all := cluster.LeaseRequest{Max: 8}
	if got := one.hand(m, blob.NewBitmap(8), all, 0, 1).Pieces; len(got) != 8 {
		t.Fatalf("one fetch hands out %v", got)
	}
	if got := other.hand(m, blob.NewBitmap(8), all, 0, 1).Pieces; len(got) != 8 {
		t.Errorf("the other fetch hands out %v", got)
	}
	whole.adopt(m.Digest, one)
	if got := whole.hand(m, blob.NewBitmap(8), all, 0, 1).Pieces; len(got) != 0 {
		t.Errorf("what was leased while it came is leased again: %v", got)
	}
	whole.adopt(m.Digest, newLeases(8))
	if got := whole.hand(m, blob.NewBitmap(8), all, 0, 1).Pieces; len(got) != 0 {
		t.Errorf("a fetch without a lease makes it forget: %v", got)
	}
}
