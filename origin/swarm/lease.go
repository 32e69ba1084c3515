package swarm

import (
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent"

	"github.com/opencontainers/go-digest"

	"kraken/origin/swarm/plan"
	"kraken/proto/blob"
)

// LeaseRequest asks a Source for pieces to fetch from it.
type LeaseRequest struct {
	Have blob.Bitmap // pieces that are not needed: here, on their way, or at peers that will deliver them
	Want []int       // pieces that readers wait for, most urgent first
	Max  int         // at most so many
	// Alone: no other peer is known, so that what was sent to others lately is not to be had from them.
	Alone bool
	// Stalled: nothing has come from anywhere for StallTimeout. A piece that was sent to others lately will do,
	// whichever it is.
	Stalled bool
}

// Why a Source leases nothing although it answers.
var (
	// ErrHeldBack: this node, or others behind its address, hold leases that they do not fetch. It may read without
	// a lease.
	ErrHeldBack = errors.New("too much is leased and not fetched")
	// ErrNotLeased: the Source does not lease this blob at all, and serves ranges of it as far as it has them: from
	// its begin on.
	ErrNotLeased = errors.New("the blob is not leased here")
)

// Source leases pieces that few others have, and serves them; an origin over HTTP. Both calls may be made concurrently.
type Source interface {
	Name() string
	// Lease answers pieces to read now, and when to ask again if there were fewer than asked for. No piece and no
	// error is "later", which is an answer, as ErrHeldBack and ErrNotLeased are; any other error says that the
	// Source could not be asked.
	Lease(ctx context.Context, m *blob.Metainfo, r LeaseRequest) (pieces []int, retryAfter time.Duration, err error)
	// ReadRange reads n bytes at off. It is also used without a lease, where none is to be had.
	ReadRange(ctx context.Context, m *blob.Metainfo, off, n int64) (io.ReadCloser, error)
}

// Doubted is a Source that wants to know of wrong bytes that it has sent.
type Doubted interface {
	// Wrong says that a piece of a blob did not pass its hash. It returns at once.
	Wrong(d digest.Digest)
}

const (
	workersPerSource = 2 // one reads while the other asks
	// maxPerSource bounds the workers of all blobs that are busy with one source. More have more connections and
	// buffers and nothing else, and on a slow link each of a hundred gets less than minProgress.
	maxPerSource = 16
	// minProgress is what a source must send within StallTimeout, or anything at all while the fetch as a whole
	// gets so much: then the link is busy, and the source has a share of it.
	minProgress = 32 << 10
	// turnWait is for how long a source may leave a request for a lease waiting for its turn.
	turnWait = time.Second
	// A read that has a small share of a busy link is let off so many times in a row.
	maxLetOff = 5
)

// errWrongPiece is a piece from a Source that does not pass.
var errWrongPiece = errors.New("piece does not match the metainfo")

// AddSource adds a source of pieces.
func (f *Fetch) AddSource(src Source) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.over {
		return
	}
	f.sources = append(f.sources, src)
	w := &worker{f: f, src: src, leasing: plan.NewLeasing(f.m.PieceLength(), f.s.cfg.StallTimeout), began: time.Now(), idle: workersPerSource - 1}
	f.wg.Go(w.run)
}

// worker leases pieces from one source and reads them, batch after batch.
type worker struct {
	f       *Fetch
	src     Source
	leasing *plan.Leasing
	began   time.Time
	idle    int  // workers of this source that have not begun
	in      bool // has one of the source's slots
}

func (w *worker) run() {
	f := w.f
	defer w.leave()
	for w.enter() {
		pieces, wait := w.next()
		claimed := f.board.Claim(pieces)
		if len(claimed) == 0 {
			if !w.pause(max(wait, plan.MinPause)) {
				return
			}
			continue
		}
		f.prioritize()
		began := time.Now()
		n, err := w.readAll(claimed)
		if err != nil {
			f.prioritize() // what was given back is fetched from peers again
			if f.ctx.Err() != nil {
				return
			}
			f.s.log.Info("origin does not deliver", "origin", w.src.Name(), "digest", f.m.Digest, "error", err)
			if doubted, ok := w.src.(Doubted); ok && errors.Is(err, errWrongPiece) {
				doubted.Wrong(f.m.Digest)
			}
			if errors.Is(err, errWrongPiece) && w.leasing.Wrong() {
				f.s.log.Warn("origin has wrong pieces and is left alone", "origin", w.src.Name(), "digest", f.m.Digest)
				return
			}
			if !w.pause(w.leasing.Failed()) {
				return
			}
			continue
		}
		w.leasing.Delivered(n, time.Since(began))
		for ; w.idle > 0 && (!f.windows.ReaderWaits() || time.Since(w.began) > plan.HeadStart); w.idle-- {
			another := &worker{f: f, src: w.src, leasing: w.leasing.Another()}
			f.wg.Go(another.run)
		}
		if wait > 0 && !w.pause(wait) {
			return
		}
	}
}

// next returns pieces to read now, leased or, where no lease is to be had, without one; else for how long to pause.
func (w *worker) next() (pieces []int, wait time.Duration) {
	f, stall := w.f, w.f.s.cfg.StallTimeout
	v := f.board.Look(f.windowPieces(), f.board.Budget(f.rateOfPeers.Load()))
	if v.Missing == 0 {
		return nil, plan.MinPause
	}
	if f.hashes != nil {
		v.Came = f.hashes.Known()
	}
	ctx, cancel := context.WithTimeout(f.ctx, stall+turnWait)
	defer cancel()
	pieces, wait, err := w.src.Lease(ctx, f.m, LeaseRequest{Have: v.Have, Want: v.Want, Max: w.leasing.Ask(), Alone: f.alone(), Stalled: f.idle() >= stall})
	if err != nil && f.ctx.Err() == nil {
		f.s.log.Debug("no lease", "origin", w.src.Name(), "digest", f.m.Digest, "error", err)
	}
	return w.leasing.Next(v, plan.Reply{Answer: answerOf(err), Pieces: pieces, RetryAfter: wait}, f.idle())
}

// answerOf returns what the error of a Source's Lease says.
func answerOf(err error) plan.Answer {
	switch {
	case err == nil:
		return plan.Leased
	case errors.Is(err, ErrHeldBack):
		return plan.HeldBack
	case errors.Is(err, ErrNotLeased):
		return plan.NotLeased
	}
	return plan.Unreachable
}

// alone reports whether no peer but origins is known.
func (f *Fetch) alone() bool {
	if !f.board.PeersSince().IsZero() {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range f.peers {
		if !p.Origin {
			return false
		}
	}
	return true
}

// enter waits for a slot of the source, behind all who wait already. False: the Fetch is over.
func (w *worker) enter() bool {
	w.leave()
	select {
	case w.f.s.slots.slotsOf(w.src) <- struct{}{}:
		w.in = true
	case <-w.f.ctx.Done():
	}
	return w.f.ctx.Err() == nil
}

func (w *worker) leave() {
	if w.in {
		w.in = false
		<-w.f.s.slots.slotsOf(w.src)
	}
}

// slots bound how many workers of all Fetches ask or read one source at once.
type slots struct {
	mu    sync.Mutex
	taken map[string]chan struct{} // of each source, by name
}

// slotsOf returns the slots of one source: who has sent into the channel has one until it receives.
func (x *slots) slotsOf(src Source) chan struct{} {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.taken == nil {
		x.taken = map[string]chan struct{}{}
	}
	s := x.taken[src.Name()]
	if s == nil {
		s = make(chan struct{}, maxPerSource)
		x.taken[src.Name()] = s
	}
	return s
}

// pause waits without a slot.
func (w *worker) pause(d time.Duration) bool {
	w.leave()
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-w.f.ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// readAll reads claimed pieces, neighbours with one request. What it could not read it gives back.
func (w *worker) readAll(claimed []int) (n int64, err error) {
	slices.Sort(claimed)
	for len(claimed) > 0 {
		k := 1
		for k < len(claimed) && claimed[k] == claimed[k-1]+1 {
			k++
		}
		read, err := w.readRun(claimed[:k])
		n += read
		if err != nil {
			w.f.board.Release(claimed)
			return n, err
		}
		claimed = claimed[k:]
	}
	return n, nil
}

// watch calls slow when a read gets less than minProgress within StallTimeout.
type watch struct {
	*time.Timer
	stall time.Duration
	got   atomic.Int64 // bytes since the timer was set
	times atomic.Int32 // in a row that the read was let off
}

// watch begins one for a read of this fetch. A read that gets little while the fetch as a whole gets enough has a small
// share of a busy link, and is let off as long as anything comes, at most maxLetOff times.
func (f *Fetch) watch(slow func()) *watch {
	w := &watch{stall: f.s.cfg.StallTimeout}
	w.Timer = time.AfterFunc(time.Hour, func() {
		busy := float64(f.rateOfAll.Load())*w.stall.Seconds() >= minProgress
		if w.got.Swap(0) > 0 && busy && w.times.Add(1) <= maxLetOff {
			w.Timer.Reset(w.stall)
			return
		}
		slow()
	})
	w.Timer.Reset(w.stall)
	return w
}

func (w *watch) reset() {
	w.got.Store(0)
	w.times.Store(0)
	w.Timer.Reset(w.stall)
}

// count returns r, counting what is read.
func (w *watch) count(r io.Reader) io.Reader {
	return readerFunc(func(p []byte) (int, error) {
		n, err := r.Read(p)
		w.got.Add(int64(n))
		return n, err
	})
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// readRun streams neighbouring pieces into the store and checks each on the way.
func (w *worker) readRun(run []int) (n int64, err error) {
	f, m := w.f, w.f.m
	off := int64(run[0]) * m.PieceLength()
	last := run[len(run)-1]
	length := int64(last)*m.PieceLength() + m.PieceSize(last) - off

	ctx, cancel := context.WithCancelCause(f.ctx)
	defer cancel(nil)
	slow := fmt.Errorf("sent less than %d bytes in %s", minProgress, f.s.cfg.StallTimeout)
	watch := f.watch(func() { cancel(slow) })
	defer watch.Stop()

	body, err := w.src.ReadRange(ctx, m, off, length)
	if err != nil {
		return 0, errors.Join(err, context.Cause(ctx))
	}
	defer body.Close()
	from := watch.count(body)
	// A body need not know the context: closing it ends a read that hangs.
	stop := context.AfterFunc(ctx, func() { body.Close() })
	defer stop()

	buf := hashBuffers.Get().(*[]byte)
	defer hashBuffers.Put(buf)
	var since int64
	for _, i := range run {
		h := sha1.New()
		for left := m.PieceSize(i); left > 0; {
			k, err := io.ReadAtLeast(from, (*buf)[:min(left, int64(len(*buf)))], int(min(left, minProgress)))
			if err != nil {
				return n, fmt.Errorf("read piece %d: %w", i, errors.Join(err, context.Cause(ctx)))
			}
			h.Write((*buf)[:k])
			if _, err := f.part.WriteAt((*buf)[:k], off); err != nil {
				f.finish(err)
				return n, err
			}
			off, left, since = off+int64(k), left-int64(k), since+int64(k)
			if since >= minProgress {
				since = 0
				watch.reset()
			}
		}
		want, err := f.pieceHash(i)
		if err != nil {
			return n, err
		}
		if [sha1.Size]byte(h.Sum(nil)) != want {
			f.wrongPiece(i, nil, nil)
			return n, fmt.Errorf("%w: piece %d", errWrongPiece, i)
		}
		if err := f.part.MarkVerified(i); err != nil {
			return n, err
		}
		n += m.PieceSize(i)
		f.verified(i, fromSource)
		// The library tells its peers without hashing again.
		f.t.use(func(lib *torrent.Torrent) { lib.Piece(i).UpdateCompletion() })
	}
	return n, nil
}
