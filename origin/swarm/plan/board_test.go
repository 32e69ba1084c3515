package plan

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"kraken/proto/blob"
)

const (
	small = 100 * blob.MinPieceLength // a piece is one block
	large = 220 << 20                 // a piece is two blocks
)

// What is on its way is left to whoever was asked for as long as blocks usually take: in a large crowd longer than a
// stall.
func TestOverdueFollowsHowLongBlocksTake(t *testing.T) {
	for _, tc := range []struct {
		name         string
		takes        time.Duration
		taken, asked time.Duration // still taken after, and asked for elsewhere after
	}{
		{"nothing came yet", 0, stall - 1, stall},
		{"quick peers", 40 * time.Millisecond, stall - 1, stall},
		{"a crowd on slow links", 3 * time.Second, 2900 * time.Millisecond, overdueStalls * stall},
		{"slower than is waited for", 60 * time.Second, overdueStalls*stall - 1, overdueStalls * stall},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m, part := blobOf(t, small)
				b := NewBoard(m, part, stall)
				peer := &Peer{}
				for i := range 50 {
					if tc.takes == 0 {
						break
					}
					b.Asked(i)
					time.Sleep(tc.takes)
					b.Unasked(i) // the library says so first
					b.Received(i, 0, m.PieceSize(i), peer)
				}
				const late = 99
				taken := func() bool { return b.Priorities([]int{late})[late] == None }
				b.Asked(late)
				time.Sleep(tc.taken)
				if !taken() {
					t.Errorf("after %s another peer would be asked", tc.taken)
				}
				time.Sleep(tc.asked - tc.taken)
				if taken() {
					t.Errorf("after %s nobody else would be asked", tc.asked)
				}
			})
		})
	}
}

// TestPieceOfOneBlock: what is done with a block, and with its piece, when something happened to the piece before.
func TestPieceOfOneBlock(t *testing.T) {
	const i = 7
	for _, tc := range []struct {
		name   string
		before func(b *Board, part *memory)
		write  bool
		check  Check
	}{
		{"nothing", func(*Board, *memory) {}, true, CheckRead},
		{"it is here", func(_ *Board, part *memory) { part.set.Set(i) }, false, CheckDone},
		{"a Source delivers it", func(b *Board, _ *memory) { b.Claim([]int{i}) }, false, CheckNo},
		{"a Source gave it back", func(b *Board, _ *memory) { b.Release(b.Claim([]int{i})) }, true, CheckRead},
		{"a block came while a Source delivered it, which gave it back", func(b *Board, _ *memory) {
			claimed := b.Claim([]int{i})
			b.BeginWrite(i)
			b.Release(claimed)
		}, true, CheckNo},
		{"the block was right", func(b *Board, _ *memory) { b.WroteWhole(i, true) }, true, CheckDone},
		{"the block was wrong", func(b *Board, _ *memory) { b.WroteWhole(i, false) }, true, CheckNo},
		{"it is being checked", func(b *Board, _ *memory) { b.BeginCheck(i) }, false, CheckNo},
		{"it could not be read", func(b *Board, _ *memory) { b.BeginCheck(i); b.Unreadable(i) }, true, CheckRead},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, part := blobOf(t, small)
			b := NewBoard(m, part, stall)
			tc.before(b, part)
			if got := b.BeginWrite(i); got != tc.write {
				t.Errorf("may be written: %v, want %v", got, tc.write)
			} else if got {
				b.EndWrite(i)
			}
			if got := b.BeginCheck(i); got != tc.check {
				t.Errorf("check %d, want %d", got, tc.check)
			}
		})
	}
}

// TestRightPieceIsNotClaimed: a piece that came whole and right, and waits for its check, is no Source's to write
// again: it would be taken for right whatever that one wrote.
func TestRightPieceIsNotClaimed(t *testing.T) {
	m, part := blobOf(t, small)
	b := NewBoard(m, part, stall)
	b.Received(3, 0, m.PieceSize(3), &Peer{})
	b.BeginWrite(3)
	b.WroteWhole(3, true)
	b.EndWrite(3)
	if got := b.Claim([]int{3, 4}); !slices.Equal(got, []int{4}) {
		t.Errorf("claimed %v, want 4 alone", got)
	}
	if got := b.BeginCheck(3); got != CheckDone {
		t.Errorf("check %d", got)
	}
}

// TestWhoLied: of a wrong piece, a single sender lied; of several all are suspects until the piece is there, and all
// but the one with the most merit go.
func TestWhoLied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, part := blobOf(t, large)
		b := NewBoard(m, part, stall)
		size := BlockSize(m.PieceLength())
		honest, liar := &Peer{ID: [20]byte{1}}, &Peer{ID: [20]byte{2}}
		get := func(i int, from ...*Peer) {
			for k, p := range from {
				b.Received(i, int64(k)*size, size, p)
				b.Wrote(i, int64(k)*size, uint64(k))
			}
			if got := b.BeginCheck(i); got != CheckRead {
				t.Fatalf("check %d", got)
			}
		}
		get(0, honest, honest)
		if _, last, first := b.Verified(0); last || !first {
			t.Error("the first of many pieces is not the first, or the last")
		}
		get(1, liar, liar)
		if liars, doubtful := b.Failed(1); !slices.Equal(liars, []*Peer{liar}) || doubtful != nil {
			t.Errorf("%v and %v, want one liar", liars, doubtful)
		}
		get(2, honest, liar)
		if liars, doubtful := b.Failed(2); liars != nil || !slices.Equal(doubtful, []*Peer{liar}) {
			t.Errorf("%v and %v, want that the one without merit is doubtful", liars, doubtful)
		}
		if !b.Doubted(liar.ID) || !b.Doubted(honest.ID) || b.Doubted([20]byte{3}) {
			t.Error("other peers are in doubt than the two that sent the piece")
		}
		if got := b.Priorities(nil)[2]; got != Now {
			t.Errorf("the piece that tells who lied has priority %d", got)
		}
		suspects, _, _ := b.Verified(2)
		if len(suspects) != 2 {
			t.Errorf("%d blocks can be judged, want 2", len(suspects))
		}
		for _, x := range suspects {
			if want := map[*Peer]uint64{honest: 0, liar: 1}[x.From]; x.Sum != want || x.Off != int64(want)*size {
				t.Errorf("%+v is not what was received", x)
			}
		}
		if b.Doubted(liar.ID) {
			t.Error("a peer is in doubt although the piece is there")
		}
		get(3, honest, liar)
		b.Failed(3)
		time.Sleep(doubtTime + 1)
		if b.Doubted(liar.ID) {
			t.Error("doubt does not end")
		}
	})
}

// TestTrustIsEarned: a peer may send a piece's worth of blocks until one with its help has passed, and is not read from
// meanwhile.
func TestTrustIsEarned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, part := blobOf(t, large)
		b := NewBoard(m, part, stall)
		size := BlockSize(m.PieceLength())
		p := &Peer{}
		if got := b.Admit(p); got != 2 {
			t.Errorf("a new peer is asked for %d blocks, want 2", got)
		}
		if b.Hold(p) != nil {
			t.Error("a new peer is not read from")
		}
		if got := b.Received(0, 0, size, p); got != 1 {
			t.Errorf("after a block it is asked for %d more, want 1", got)
		}
		b.Received(0, size, size, p)
		held := b.Hold(p)
		if held == nil {
			t.Fatal("it is read from before it was judged")
		}
		b.Verified(0)
		select {
		case <-held:
		default:
			t.Error("a verdict does not wake who waits")
		}
		if b.Hold(p) != nil {
			t.Error("it has proved itself and is not read from")
		}
		other := &Peer{}
		b.Received(1, 0, size, other)
		b.Received(1, size, size, other)
		if b.Excuse(other); b.Hold(other) != nil {
			t.Error("who was excused is not read from")
		}
		// A little above 4 MiB/s: 2 MiB in half a second, and one block more.
		for i := range 200 {
			time.Sleep(60 * time.Millisecond)
			b.Received(10+i, 0, size, p)
		}
		if got := b.Admit(p); got != 9 {
			t.Errorf("a quick peer is asked for %d blocks, want 9", got)
		}
	})
}

// TestClaim: a Source gets what is missing and nobody else brings.
func TestClaim(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, part := blobOf(t, small)
		b := NewBoard(m, part, stall)
		part.set.Set(0)
		b.Asked(1)
		b.BeginWrite(2)
		b.BeginCheck(3)
		b.Claim([]int{4})
		all := []int{-1, 0, 1, 2, 3, 4, 5, m.NumPieces()}
		if got := b.Claim(all); !slices.Equal(got, []int{5}) {
			t.Errorf("claimed %v, want 5 alone", got)
		}
		b.Release([]int{5})
		time.Sleep(stall)
		if got := b.Claim(all); !slices.Equal(got, []int{1, 5}) {
			t.Errorf("claimed %v, want 5 and what is overdue", got)
		}
	})
}
