package plan

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/blob"
)

// TestLook: what peers deliver soon is not leased, and what readers wait for comes first.
func TestLook(t *testing.T) {
	for _, tc := range []struct {
		name    string
		prepare func(b *Board, part *memory)
		windows []int
		budget  int64 // pieces
		want    []int
		missing []int
	}{
		{"nothing is known", func(*Board, *memory) {}, []int{5, 6}, 100, []int{5, 6}, pieces(0, 100)},
		{"some are here", func(_ *Board, part *memory) { part.set.Set(5); part.set.Set(9) }, []int{5, 6}, 100, []int{6}, append(append(pieces(0, 5), pieces(6, 9)...), pieces(10, 100)...)},
		{"peers have all and will deliver", func(b *Board, _ *memory) { gained(b, pieces(0, 100)) }, []int{5}, 100, nil, nil},
		{"peers have all and will deliver ten, the windows' first", func(b *Board, _ *memory) { gained(b, pieces(0, 100)) }, []int{50, 51}, 10, nil, append(pieces(8, 50), pieces(52, 100)...)},
		{"peers have little", func(b *Board, _ *memory) { gained(b, pieces(0, 90)) }, nil, 100, nil, pieces(90, 100)},
		{"a peer is gone", func(b *Board, _ *memory) { gained(b, pieces(0, 100)); b.Lost(7) }, nil, 100, nil, []int{7}},
		{"on its way", func(b *Board, _ *memory) { b.Claim(pieces(0, 50)); b.Asked(50) }, []int{0, 50, 60}, 100, []int{60}, pieces(51, 100)},
		{"overdue", func(b *Board, _ *memory) { b.Asked(50); time.Sleep(stall) }, []int{50}, 0, []int{50}, pieces(0, 100)},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, part := blobOf(t, small)
				b := NewBoard(m, part, stall)
				tc.prepare(b, part)
				v := b.Look(tc.windows, tc.budget*m.PieceLength())
				if !slices.Equal(v.Want, tc.want) {
					t.Errorf("want %v, should be %v", v.Want, tc.want)
				}
				var missing []int
				for i := range m.NumPieces() {
					if !v.Have.Has(i) {
						missing = append(missing, i)
					}
				}
				if !slices.Equal(missing, tc.missing) || v.Missing != len(missing) {
					t.Errorf("missing %v, %d, should be %v", missing, v.Missing, tc.missing)
				}
			})
		})
	}
}

func gained(b *Board, all []int) {
	for _, i := range all {
		b.Gained(i)
	}
}

// TestBudget: new peers are trusted without a rate, later by what they delivered.
func TestBudget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, part := blobOf(t, small)
		b := NewBoard(m, part, stall)
		time.Sleep(time.Minute)
		b.Gained(1)
		if got := b.Budget(0); got != m.Size {
			t.Errorf("new peers are trusted with %d bytes", got)
		}
		time.Sleep(grace)
		if got := b.Budget(1000); got != 2000 {
			t.Errorf("peers that deliver 1000 bytes a second are trusted with %d", got)
		}
	})
}

// TestNextLease: what a worker reads after each answer, or for how long it pauses.
func TestNextLease(t *testing.T) {
	const idle, busy = stall, stall - 1
	for _, tc := range []struct {
		name    string
		answers []Answer // before; the last one counts
		pieces  []int
		after   time.Duration
		idle    time.Duration
		count   int // pieces to read
		first   int // of them, -1: any
		pause   time.Duration
	}{
		{"leased", []Answer{Leased}, []int{3, 4}, 0, busy, 2, 3, 0},
		{"leased, and later more", []Answer{Leased}, []int{3}, time.Second, busy, 1, 3, time.Second},
		{"later", []Answer{Leased}, nil, time.Second, busy, 0, 0, time.Second},
		{"later, at once", []Answer{Leased}, nil, 0, busy, 0, 0, MinPause},
		{"later, however long nothing comes", []Answer{Leased}, nil, 0, time.Hour, 0, 0, MinPause},
		{"held back", []Answer{HeldBack}, nil, time.Second, idle, 0, 0, time.Second},
		{"held back again and again", []Answer{HeldBack, HeldBack, HeldBack, HeldBack}, nil, time.Second, busy, 1, -1, 0},
		{"held back, but not in a row", []Answer{HeldBack, HeldBack, Leased, HeldBack}, nil, 0, busy, 0, 0, MinPause},
		{"not leased, and others bring something", []Answer{NotLeased}, nil, 0, busy, 0, 0, 250 * time.Millisecond},
		{"not leased, and nothing comes", []Answer{NotLeased}, nil, 0, idle, 1, 50, 0},
		{"not reached", []Answer{Unreachable}, nil, 0, busy, 0, 0, 250 * time.Millisecond},
		{"not reached, and nothing comes", []Answer{Unreachable}, nil, 0, idle, 1, -1, 0},
		{"not reached once", []Answer{Leased, Unreachable}, nil, 0, idle, 0, 0, 250 * time.Millisecond},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, part := blobOf(t, small)
				b := NewBoard(m, part, stall)
				l := NewLeasing(m.PieceLength(), stall)
				v := b.Look([]int{50}, 0)
				time.Sleep(stall)
				var got []int
				var pause time.Duration
				for _, a := range tc.answers {
					l.Ask()
					got, pause = l.Next(v, Reply{Answer: a, Pieces: tc.pieces, RetryAfter: tc.after}, tc.idle)
				}
				if len(got) != tc.count || pause != tc.pause || tc.count > 0 && tc.first >= 0 && got[0] != tc.first {
					t.Errorf("reads %v, pauses %s; want %d pieces from %d on, %s", got, pause, tc.count, tc.first, tc.pause)
				}
			})
		})
	}
}

// TestLeaseSize: leases grow and shrink until one takes about leaseTime; what fails is asked less and less often.
func TestLeaseSize(t *testing.T) {
	for _, tc := range []struct {
		name string
		rate float64 // bytes a second
		want int     // pieces, in the end
	}{
		{"slow", 50 << 10, 1},
		{"25 Mbit/s", 3_125_000, 4},
		{"fast", 4 << 30, 128},
	} {
		l := NewLeasing(128<<10, stall)
		if n := l.Ask(); n != 1 {
			t.Errorf("the first lease is of %d pieces", n)
		}
		for range 20 {
			n := int64(l.Ask()) * 128 << 10
			l.Delivered(n, time.Duration(float64(n)/tc.rate*float64(time.Second)))
		}
		if n := l.Ask(); n != tc.want {
			t.Errorf("%s: a lease is of %d pieces, want %d", tc.name, n, tc.want)
		}
		if n := l.Another().Ask(); n != tc.want {
			t.Errorf("%s: a second worker begins with %d pieces, want %d", tc.name, n, tc.want)
		}
	}
	l := NewLeasing(128<<10, stall)
	for _, want := range []time.Duration{250, 500, 1000, 2000, 4000, 5000, 5000} {
		if got := l.Failed(); got != want*time.Millisecond {
			t.Errorf("pauses for %s, want %s", got, want*time.Millisecond)
		}
	}
	if l.Delivered(1, 0); l.Failed() != 250*time.Millisecond {
		t.Error("what was delivered does not end the long pauses")
	}
	if first, second, third := l.Wrong(), l.Wrong(), l.Wrong(); first || second || !third {
		t.Error("a Source with wrong pieces is not left alone after the third")
	}
}

// What is read without a lease is any missing piece and its neighbours.
func TestSomeMissing(t *testing.T) {
	have := blob.NewBitmap(100)
	for i := 40; i < 60; i++ {
		have.Set(i)
	}
	v := View{Have: have, Missing: 80, Came: 100}
	first := map[int]bool{}
	for range 50 {
		got := v.someMissing(4)
		if len(got) == 0 || len(got) > 4 || have.Has(got[0]) {
			t.Fatalf("%v are to be read", got)
		}
		for k, i := range got {
			if i != got[0]+k || have.Has(i) {
				t.Fatalf("%v are no missing neighbours", got)
			}
		}
		first[got[0]] = true
	}
	if len(first) < 10 {
		t.Errorf("50 agents would read only %v", first)
	}
}

// Of a blob that still arrives where it comes from, nobody reads without a lease what has not come: it would wait for
// that until it gives up, and count as one who does not fetch.
func TestNothingIsReadBeforeItHasCome(t *testing.T) {
	have := blob.NewBitmap(100)
	for i := range 10 {
		have.Set(i)
	}
	v := View{Have: have, Missing: 90, Want: []int{50, 12, 15}, Came: 14}
	for range 50 {
		if got := v.someMissing(8); len(got) == 0 || got[0] < 10 || got[len(got)-1] >= v.Came {
			t.Fatalf("%v are to be read, of which only 10 to 13 can be", got)
		}
	}
	if got := v.firstMissing(3); !slices.Equal(got, []int{12, 10, 11}) {
		t.Errorf("%v are to be read first, want 12, 10 and 11", got)
	}
	v.Came = 10
	if got := append(v.someMissing(8), v.firstMissing(8)...); len(got) > 0 {
		t.Errorf("%v are to be read, and nothing has come that is not here", got)
	}
}
