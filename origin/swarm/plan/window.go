package plan

import (
	"cmp"
	"slices"
	"sync"
	"time"

	"kraken/proto/blob"
)

const (
	// urgent is how many pieces at the front of the windows have the highest priority. The rest is asked for in order
	// as well.
	urgent = 2
	// windowTime is for how long ahead of a reader pieces are fetched in order.
	windowTime = 500 * time.Millisecond
	// HeadStart is for how long after the begin of a fetch no rate is known, and a Source has one worker, so that a
	// reader's first piece comes soon.
	HeadStart = time.Second
)

// Windows holds what the readers of a blob wait for. It is safe for concurrent use.
type Windows struct {
	m     *blob.Metainfo
	part  Pieces
	began time.Time

	mu  sync.Mutex
	all map[int64]window // by reader
}

// window is what a reader waits for, in bytes.
type window struct{ off, length int64 }

// NewWindows returns the Windows of a fetch that begins now with what part has.
func NewWindows(m *blob.Metainfo, part Pieces) *Windows {
	return &Windows{m: m, part: part, began: time.Now(), all: map[int64]window{}}
}

// Set notes that a reader will read length bytes from off on; it replaces the reader's window before.
func (w *Windows) Set(reader, off, length int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all[reader] = window{off, length}
}

// Drop forgets the window of a reader.
func (w *Windows) Drop(reader int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.all, reader)
}

// Pieces lists the missing pieces of all windows, the ones at the front of each window first. A window is as long as
// what comes in windowTime at rate, in bytes a second: readers are fed in time when that much is there in order. More
// in order would make every node of a swarm want the same pieces, and leave them nothing to trade.
func (w *Windows) Pieces(rate int64) []int {
	w.mu.Lock()
	defer w.mu.Unlock()
	type waited struct{ piece, distance int }
	near := map[int]int{}
	l := w.m.PieceLength()
	ahead := max(urgent*l, int64(float64(rate)*windowTime.Seconds()))
	if time.Since(w.began) < HeadStart {
		ahead = w.m.Size // no rate is known yet
	}
	for _, x := range w.all {
		first, last := x.off/l, min(x.off+min(x.length, ahead)-1, w.m.Size-1)/l
		for i := first; i <= last && i >= 0; i++ {
			d := int(i - first)
			if old, ok := near[int(i)]; !ok || d < old {
				near[int(i)] = d
			}
		}
	}
	var all []waited
	for i, d := range near {
		if !w.part.Has(i) {
			all = append(all, waited{i, d})
		}
	}
	slices.SortFunc(all, func(a, b waited) int { return cmp.Or(a.distance-b.distance, a.piece-b.piece) })
	out := make([]int, len(all))
	for k, a := range all {
		out[k] = a.piece
	}
	return out
}

// ReaderWaits reports whether a reader's next byte is missing.
func (w *Windows) ReaderWaits() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, x := range w.all {
		if i := x.off / w.m.PieceLength(); i < int64(w.m.NumPieces()) && !w.part.Has(int(i)) {
			return true
		}
	}
	return false
}

// Priority is how eagerly peers are asked for a piece.
type Priority int

// Priorities, the least eager first.
const (
	None      Priority = iota // peers are not asked
	Normal                    // the rarest come first
	Readahead                 // in order
	Now                       // before all others
)

// Priorities returns the priority of the pieces of which it is not Normal. windows are the pieces that readers wait
// for, in order.
//
// The BitTorrent library takes requests from one peer to give them to another that has less to do, so what is on its
// way would come twice. It leaves alone what has priority None, and takes it all the same when it comes.
func (b *Board) Priorities(windows []int) map[int]Priority {
	b.mu.Lock()
	defer b.mu.Unlock()
	out := map[int]Priority{}
	for k, i := range windows {
		out[i] = Readahead
		if k < urgent {
			out[i] = Now
		}
	}
	for _, i := range b.doubtful() {
		out[i] = Now
	}
	for _, i := range b.taken() {
		out[i] = None
	}
	return out
}

// doubtful lists the pieces that did not pass and whose senders are in doubt. The caller holds b.mu.
func (b *Board) doubtful() (out []int) {
	for i, p := range b.moving {
		if len(p.suspects) > 0 {
			out = append(out, i)
		}
	}
	return out
}

// taken lists the pieces that nobody else should be asked for: Sources deliver them, or peers were asked for all that
// is missing, not so long ago that it is overdue. The caller holds b.mu.
func (b *Board) taken() (out []int) {
	now, overdue := time.Now(), b.overdue()
	for i, p := range b.moving {
		if p.claimed || b.fullyRequested(i, p) && now.Sub(b.askedAt[i]) < overdue {
			out = append(out, i)
		}
	}
	return out
}
