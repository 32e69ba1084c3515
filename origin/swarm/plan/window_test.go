package plan

import (
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

func TestWindows(t *testing.T) {
	type win struct{ off, length int64 } // in pieces
	for _, tc := range []struct {
		name    string
		windows []win
		have    []int
		after   time.Duration
		rate    int64 // pieces a second
		want    []int
		waits   bool
	}{
		{"nobody reads", nil, nil, 0, 0, nil, false},
		{"no rate is known", []win{{10, 5}}, nil, 0, 0, pieces(10, 15), true},
		{"half a second ahead", []win{{10, 50}}, nil, HeadStart, 20, pieces(10, 20), true},
		{"two pieces at least", []win{{10, 50}}, nil, HeadStart, 0, pieces(10, 12), true},
		{"what is here is passed over", []win{{10, 5}}, []int{10, 12}, 0, 0, []int{11, 13, 14}, false},
		{"fronts come first", []win{{50, 3}, {10, 3}}, nil, 0, 0, []int{10, 50, 11, 51, 12, 52}, true},
		{"shared pieces come once", []win{{10, 3}, {11, 3}}, nil, 0, 0, []int{10, 11, 12, 13}, true},
		{"the end", []win{{98, 50}}, nil, 0, 0, []int{98, 99}, true},
		{"behind the end", []win{{100, 50}}, nil, 0, 0, nil, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, part := blobOf(t, small)
				w := NewWindows(m, part)
				for _, i := range tc.have {
					part.set.Set(i)
				}
				for k, x := range tc.windows {
					w.Set(int64(k), x.off*m.PieceLength(), x.length*m.PieceLength())
				}
				time.Sleep(tc.after)
				if got := w.Pieces(tc.rate * m.PieceLength()); !slices.Equal(got, tc.want) {
					t.Errorf("%v, want %v", got, tc.want)
				}
				if got := w.ReaderWaits(); got != tc.waits {
					t.Errorf("a reader waits: %v", got)
				}
				for k := range tc.windows {
					w.Drop(int64(k))
				}
				if got := w.Pieces(tc.rate * m.PieceLength()); len(got) > 0 {
					t.Errorf("%v when all have gone", got)
				}
			})
		})
	}
}

func TestPriorities(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, part := blobOf(t, small)
		b := NewBoard(m, part, stall)
		b.Claim([]int{11})
		b.Asked(40)
		want := map[int]Priority{10: Now, 11: None, 12: Readahead, 13: Readahead, 40: None}
		if got := b.Priorities([]int{10, 11, 12, 13}); !maps.Equal(got, want) {
			t.Errorf("%v, want %v", got, want)
		}
		b.Release([]int{11})
		b.Unasked(40)
		if got, want := b.Priorities(nil), (map[int]Priority{}); !maps.Equal(got, want) {
			t.Errorf("%v when nothing is on its way", got)
		}
	})
}

// TestAbandonedWindow simulates a Source that delivers 6 MiB a second to two workers, and a peer beside it that gives
// what has the highest priority: a reader leaves, and another one's window comes before what the first would have read.
func TestAbandonedWindow(t *testing.T) {
	const (
		length = 128 << 10
		rate   = 6 << 20 // bytes a second
	)
	left, next, rest := pieces(64, 128), pieces(128, 144), pieces(0, 32)
	synctest.Test(t, func(t *testing.T) {
		m, part := blobOf(t, 24<<20)
		b, w := NewBoard(m, part, stall), NewWindows(m, part)
		l := NewLeasing(length, stall)
		var order []int
		read := func() {
			v := b.Look(w.Pieces(rate), b.Budget(0))
			n := l.Ask()
			lease := v.Want[:min(n, len(v.Want))]
			for i := 0; i < m.NumPieces() && len(lease) < n; i++ {
				if !v.Have.Has(i) && !slices.Contains(lease, i) {
					lease = append(lease, i)
				}
			}
			got, _ := l.Next(v, Reply{Pieces: lease}, 0)
			began := time.Now()
			for _, i := range b.Claim(got) {
				time.Sleep(time.Second * length / rate)
				part.set.Set(i)
				b.Verified(i)
				order = append(order, i)
			}
			l.Delivered(int64(len(got))*length, time.Since(began))
		}
		until := func(all []int) []int {
			from := len(order)
			for slices.ContainsFunc(all, func(i int) bool { return !part.Has(i) }) {
				read()
			}
			return order[from:]
		}
		w.Set(1, 8<<20, 8<<20)
		until(left[:20])
		w.Drop(1)
		w.Set(2, 16<<20, 2<<20)
		for i := range b.Priorities(w.Pieces(rate)) {
			if slices.Contains(left, i) {
				t.Errorf("piece %d is asked of peers in order, and nobody waits for it", i)
			}
		}
		if got := in(until(next), left[0], left[63]+1); got > 0 {
			t.Errorf("%d pieces were leased for a reader that has gone before the window of one that reads", got)
		}
		w.Drop(2)
		if got := in(until(rest), left[0], left[63]+1); got > 0 {
			t.Errorf("%d pieces were leased for a reader that has gone before what is in order", got)
		}
	})
}
