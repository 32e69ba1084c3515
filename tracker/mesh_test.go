package tracker

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/announce"
)

var theBlob = digest.FromString("the blob")

// wide are bounds that nothing reaches.
var wide = bounded(func(*bounds) {})

// bounded is wide but for what change sets.
func bounded(change func(*bounds)) bounds {
	const many = 1 << 30
	b := bounds{peers: many, pairs: many, swarm: many, unconfirmed: many, sourcePeers: many, sourcePairs: many, sourceUnconfirmed: many}
	change(&b)
	return b
}

// nobody makes announcers that differ in id and address.
func nobody(i int) identity {
	id := announce.PeerID([]byte("-KN0001-000000000000"))
	binary.BigEndian.PutUint32(id[16:], uint32(i))
	a := netip.AddrFrom4([4]byte{10, byte(i >> 16), byte(i >> 8), byte(i)})
	return identity{id: id, addrs: [2]netip.AddrPort{netip.AddrPortFrom(a, 16062)}, node: fmt.Sprintf("agent-%02d", i), source: callerAt(a).source}
}

func (s *store) say(t testing.TB, who identity, states ...announce.BlobState) {
	t.Helper()
	if o := s.register(who, states); o.refused != 0 {
		t.Fatalf("%d of %d states were refused: %s", o.refused, len(states), o.why)
	}
}

func leeching() announce.BlobState { return announce.BlobState{Digest: theBlob, Size: 100, Left: 60} }
func seeding() announce.BlobState  { return announce.BlobState{Digest: theBlob, Size: 100} }

func ids(h handout) []announce.PeerID {
	out := make([]announce.PeerID, len(h.peers))
	for i, c := range h.peers {
		out[i] = c.id
	}
	return out
}

// graph is what all leechers are told together.
func graph(s *store, n, numWant int) map[announce.PeerID][]announce.PeerID {
	g := map[announce.PeerID][]announce.PeerID{}
	for i := range n {
		id := nobody(i).id
		g[id] = ids(s.handout(theBlob, asking{id: id}, numWant))
	}
	return g
}

func reached(g map[announce.PeerID][]announce.PeerID, from announce.PeerID) (count, hops int) {
	seen := map[announce.PeerID]bool{from: true}
	ring := []announce.PeerID{from}
	for len(ring) > 0 {
		var next []announce.PeerID
		for _, a := range ring {
			for _, b := range g[a] {
				if !seen[b] {
					seen[b] = true
					next = append(next, b)
				}
			}
		}
		if ring = next; len(ring) > 0 {
			hops++
		}
	}
	return len(seen), hops
}

// TestGraph: for every size of a swarm the answers make one symmetric, connected graph of bounded degree.
func TestGraph(t *testing.T) {
	const numWant = 40
	degree := degreeOf(numWant)
	s := newStore(time.Minute, degree, wide)
	for n := 1; n <= 200; n++ {
		s.say(t, nobody(n-1), leeching())
		g := graph(s, n, numWant)
		total := 0
		for a, out := range g {
			if slices.Contains(out, a) {
				t.Fatalf("%d peers: one is given itself", n)
			}
			sorted := slices.SortedFunc(slices.Values(out), func(a, b announce.PeerID) int { return slices.Compare(a[:], b[:]) })
			if len(slices.Compact(sorted)) != len(out) {
				t.Fatalf("%d peers: one is given a peer twice", n)
			}
			least := min(n-1, degree)
			if n > 2*degree {
				least = degree / 2
			}
			if len(out) > degree || len(out) < least {
				t.Fatalf("%d peers: one is given %d, want %d..%d", n, len(out), least, degree)
			}
			for _, b := range out {
				if !slices.Contains(g[b], a) {
					t.Fatalf("%d peers: an edge has one direction", n)
				}
			}
			total += len(out)
		}
		count, hops := reached(g, nobody(0).id)
		if count != n {
			t.Fatalf("%d peers: %d can be reached from the first", n, count)
		}
		if hops > 3 {
			t.Errorf("%d peers: the last is %d hops away", n, hops)
		}
		if n == 200 && total < n*degree*4/5 {
			t.Errorf("%d peers are given %d on average, want nearly %d", n, total/n, degree)
		}
	}
}

// TestGraphOfAThousand: also in a swarm of 1,000 everybody can be reached over leechers alone, few know many, and none
// is left alone when a third of the others have been killed without a word: those are known to be gone by what has
// taken their address.
func TestGraphOfAThousand(t *testing.T) {
	const n, numWant = 1000, 40
	degree := degreeOf(numWant)
	s := newStore(time.Minute, degree, wide)
	for i := range n {
		s.say(t, nobody(i), leeching())
	}
	g := graph(s, n, numWant)
	for id, out := range g {
		if len(out) > degree || len(out) < degree*4/5 {
			t.Errorf("%s is given %d, want %d..%d", id, len(out), degree*4/5, degree)
		}
	}
	if count, hops := reached(g, nobody(0).id); count != n || hops > 4 {
		t.Errorf("%d of %d can be reached from the first, the last in %d hops", count, n, hops)
	}
	given := map[announce.PeerID]int{}
	for i := range 200 { // complete peers: each leecher knows some, none is known to all
		s.say(t, nobody(n+i), seeding())
	}
	for i := range n {
		for _, p := range s.handout(theBlob, asking{id: nobody(i).id}, numWant).peers {
			if p.complete {
				given[p.id]++
			}
		}
	}
	for id, k := range given {
		if k > n*numWant/200 {
			t.Errorf("the complete peer %s is given to %d of %d leechers", id, k, n)
		}
	}

	killed := map[announce.PeerID]bool{}
	for i := 0; i < n; i += 3 {
		killed[nobody(i).id] = true
		again := nobody(10_000 + i)
		again.addrs, again.source = nobody(i).addrs, nobody(i).source
		s.say(t, again, announce.BlobState{Digest: digest.FromString("another blob")})
	}
	alive := map[announce.PeerID][]announce.PeerID{}
	for i := range n {
		if id := nobody(i).id; !killed[id] {
			for _, p := range s.handout(theBlob, asking{id: id}, numWant).peers {
				if killed[p.id] {
					t.Fatal("who was killed is handed out")
				}
				if !p.complete {
					alive[id] = append(alive[id], p.id)
				}
			}
		}
	}
	if count, _ := reached(alive, nobody(1).id); count != n-len(killed) {
		t.Errorf("%d of %d that are left can be reached", count, n-len(killed))
	}
}

// TestLateComersAreNotApart: peers that ask once, when they come, are connected with those that came before, however
// closed a circle those are.
func TestLateComersAreNotApart(t *testing.T) {
	const n, numWant = 400, 40
	s := newStore(time.Minute, degreeOf(numWant), wide)
	g := map[announce.PeerID][]announce.PeerID{}
	for i := range n {
		id := nobody(i).id
		s.say(t, nobody(i), leeching())
		for _, other := range ids(s.handout(theBlob, asking{id: id}, numWant)) {
			g[id], g[other] = append(g[id], other), append(g[other], id)
		}
		if count, _ := reached(g, id); count != i+1 {
			t.Fatalf("%d of %d can be reached from who came last", count, i+1)
		}
	}
	early, half := 0, nobody(n/2).id
	for i := n / 2; i < n; i++ {
		for _, other := range g[nobody(i).id] {
			if slices.Compare(other[:], half[:]) < 0 {
				early++
			}
		}
	}
	if early < n/2*degreeOf(numWant)/4 {
		t.Errorf("the second half has %d connections to the first", early)
	}
}

// TestSmallAgain: a swarm that shrinks and grows hands out the same as one that was never larger or smaller.
func TestSmallAgain(t *testing.T) {
	const numWant = 40
	degree := degreeOf(numWant)
	s := newStore(time.Minute, degree, wide)
	for i := range 100 {
		s.say(t, nobody(i), leeching())
	}
	gone := announce.BlobState{Digest: theBlob, Event: announce.EventStopped}
	for _, n := range []int{2*degree + 1, 2 * degree, degree + 1, 2*degree + 1, degree, 1, degree / 2, degree + 1, degree + 2, 2 * degree, 2*degree + 1, 100} {
		for i := range 100 {
			if i < n {
				s.say(t, nobody(i), leeching())
			} else {
				s.say(t, nobody(i), gone)
			}
		}
		fresh := newStore(time.Minute, degree, wide)
		for i := range n {
			fresh.say(t, nobody(i), leeching())
		}
		want := graph(fresh, n, numWant)
		for id, got := range graph(s, n, numWant) {
			if !slices.Equal(got, want[id]) {
				t.Fatalf("%d peers: %s is given %d, and %d where the others never were", n, id, len(got), len(want[id]))
			}
		}
	}
}

// TestGraphStable: one peer more or less changes the neighbours of a few, and what it changes stays a graph.
func TestGraphStable(t *testing.T) {
	const n, numWant = 150, 40
	s := newStore(time.Minute, degreeOf(numWant), wide)
	for i := range n {
		s.say(t, nobody(i), leeching())
	}
	before := graph(s, n, numWant)
	s.say(t, nobody(n), leeching())
	changed := 0
	for a, out := range graph(s, n, numWant) {
		for _, b := range before[a] {
			if !slices.Contains(out, b) {
				changed++
			}
		}
	}
	// Each of the circles breaks one edge, seen from both of its ends, and an edge may be on two circles.
	if limit := degreeOf(numWant); changed == 0 || changed > limit {
		t.Errorf("a new peer ended %d of the others' edges, want 1..%d", changed, limit)
	}
	s.say(t, nobody(n), announce.BlobState{Digest: theBlob, Event: announce.EventStopped})
	for a, out := range graph(s, n, numWant) {
		if !slices.Equal(out, before[a]) {
			t.Fatal("it left, and the graph is not what it was")
		}
	}
}

// TestGraphIndependentOfHistory: a tracker that restarts, or a second one, hands out the same graph in whatever order
// peers come.
func TestGraphIndependentOfHistory(t *testing.T) {
	const n, numWant = 120, 40
	order := rand.New(rand.NewPCG(1, 2)).Perm(n)
	a, b := newStore(time.Minute, degreeOf(numWant), wide), newStore(time.Minute, degreeOf(numWant), wide)
	for i := range n {
		a.say(t, nobody(i), leeching())
		b.say(t, nobody(order[i]), leeching())
	}
	want := graph(a, n, numWant)
	for id, got := range graph(b, n, numWant) {
		if !slices.Equal(got, want[id]) {
			t.Fatalf("%s is given %v, and %v elsewhere", id, got, want[id])
		}
	}
}

// TestCompleteShare: every leecher knows some complete peers, at most half of its answer, and none is asked by
// everybody.
func TestCompleteShare(t *testing.T) {
	const numWant = 40
	for _, c := range []struct{ leechers, seeds int }{{1, 0}, {1, 1}, {1, 100}, {10, 30}, {60, 1}, {60, 100}, {200, 800}} {
		s := newStore(time.Minute, degreeOf(numWant), wide)
		for i := range c.leechers {
			s.say(t, nobody(i), leeching())
		}
		for i := range c.seeds {
			s.say(t, nobody(c.leechers+i), seeding())
		}
		asked := map[announce.PeerID]int{}
		for i := range c.leechers {
			h := s.handout(theBlob, asking{id: nobody(i).id}, numWant)
			if h.seeds != c.seeds || h.leechers != c.leechers || len(h.peers) > numWant {
				t.Fatalf("%+v: %d peers of %d seeds and %d leechers", c, len(h.peers), h.seeds, h.leechers)
			}
			complete := 0
			for _, p := range h.peers {
				if p.complete {
					complete++
					asked[p.id]++
				}
			}
			if complete < min(c.seeds, numWant/4) || complete > numWant/2 {
				t.Fatalf("%+v: %d complete peers in an answer, want %d..%d", c, complete, min(c.seeds, numWant/4), numWant/2)
			}
		}
		if c.seeds < numWant {
			continue
		}
		total := 0
		for _, n := range asked {
			total += n
		}
		fair := total/c.seeds + 1
		for id, n := range asked {
			if n > 5*fair+5 {
				t.Errorf("%+v: %s is given to %d leechers, a fair share is %d", c, id, n, fair)
			}
		}
	}
}

func TestCompletePeerIsGivenLeechers(t *testing.T) {
	s := newStore(time.Minute, degreeOf(40), wide)
	for i := range 100 {
		s.say(t, nobody(i), leeching())
		s.say(t, nobody(100+i), seeding())
	}
	h := s.handout(theBlob, asking{id: nobody(100).id}, 40)
	if len(h.peers) != 40 {
		t.Errorf("%d peers, want 40", len(h.peers))
	}
	for _, p := range h.peers {
		if p.complete {
			t.Fatal("a seed is given a seed")
		}
	}
	if h := s.handout(theBlob, asking{id: nobody(999).id}, 40); len(h.peers) == 0 {
		t.Error("an asker that is not known is given nobody")
	}
}

func TestNumWant(t *testing.T) {
	s := newStore(time.Minute, degreeOf(40), wide)
	for i := range 100 {
		s.say(t, nobody(i), leeching())
		s.say(t, nobody(100+i), seeding())
	}
	for want := range 45 {
		h := s.handout(theBlob, asking{id: nobody(0).id}, want)
		if len(h.peers) > want || len(h.peers) < want*3/4 {
			t.Errorf("asked for %d, given %d", want, len(h.peers))
		}
		if want > 0 && !h.peers[0].complete {
			t.Errorf("asked for %d, and the first has not all", want)
		}
	}
}
