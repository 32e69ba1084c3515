package swarm

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"kraken/origin/store"
	"kraken/proto/blob"
)

// What is on its way is left to whoever was asked for as long as blocks usually take: in a large crowd longer than a
// stall.
func TestOverdueFollowsHowLongBlocksTake(t *testing.T) {
	const stall = 2 * time.Second
	st, err := store.Open(store.Config{Dir: t.TempDir()})
	if err != nil {
		t.Fatal(err)
	}
	defer st.Close()
	m := metainfoOf(t, make([]byte, 100*blob.MinPieceLength))
	part, err := st.Partial(m)
	if err != nil {
		t.Fatal(err)
	}
	defer part.Close()
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
				b := newBoard(m, part)
				peer := &conn{}
				for i := range 50 {
					if tc.takes == 0 {
						break
					}
					b.asked(i)
					time.Sleep(tc.takes)
					b.unasked(i) // the library says so first
					b.received(i, 0, m.PieceSize(i), peer)
				}
				const late = 99
				b.asked(late)
				time.Sleep(tc.taken)
				if !slices.Contains(b.taken(stall), late) {
					t.Errorf("after %s another peer would be asked", tc.taken)
				}
				time.Sleep(tc.asked - tc.taken)
				if slices.Contains(b.taken(stall), late) {
					t.Errorf("after %s nobody else would be asked", tc.asked)
				}
			})
		})
	}
}
