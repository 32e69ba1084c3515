package swarm

import (
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/anacrolix/torrent"

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

const (
	workersPerSource = 2 // one reads while the other asks
	// maxPerSource bounds the workers of all blobs that are busy with one source. More have more connections and
	// buffers and nothing else, and on a slow link each of a hundred gets less than minProgress.
	maxPerSource = 16
	// A lease is sized to be read in leaseTime.
	leaseTime = 200 * time.Millisecond
	// The first lease is a piece or so: what a reader waits for should share a slow link with little else, and of a
	// crowd each gets something to trade that much sooner.
	leaseFirst, leaseLimit = 128 << 10, 16 << 20
	// headStart is for how long at most a source has one worker, so that a reader's first piece comes soon.
	headStart = time.Second
	maxLease  = 256 // pieces; the protocol's limit
	// horizon is for how long peers are trusted to deliver at their rate; new peers are trusted without one for grace.
	horizon, grace = 2 * time.Second, time.Second
	// minProgress is what a source must send within StallTimeout, or anything at all while the fetch as a whole
	// gets so much: then the link is busy, and the source has a share of it.
	minProgress = 32 << 10
	// turnWait is for how long a source may leave a request for a lease waiting for its turn.
	turnWait = time.Second
	// A read that has a small share of a busy link is let off so many times in a row.
	maxLetOff = 5
	// After so many answers of ErrHeldBack in a row pieces are read without leases.
	maxHeldBack = 4
	// A source that has sent so many wrong pieces is not used any more.
	maxWrong = 3
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
	w := &worker{f: f, src: src, size: leaseFirst, began: time.Now(), answered: time.Now(), idle: workersPerSource - 1}
	f.wg.Go(w.run)
}

// worker leases pieces from one source and reads them, batch after batch.
type worker struct {
	f        *Fetch
	src      Source
	size     int64 // of the next lease, in bytes
	fails    int
	wrong    int
	began    time.Time
	answered time.Time // when the source last answered a request for a lease, be it with "later"
	heldBack int       // answers of ErrHeldBack in a row
	idle     int       // workers of this source that have not begun
	in       bool      // has one of the source's slots
}

func (w *worker) run() {
	f := w.f
	defer w.leave()
	for w.enter() {
		pieces, wait := w.next()
		claimed := f.board.claim(pieces, f.s.cfg.StallTimeout)
		if len(claimed) == 0 {
			if !w.pause(max(wait, tick/2)) {
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
			if errors.Is(err, errWrongPiece) {
				if w.wrong++; w.wrong >= maxWrong {
					f.s.log.Warn("origin has wrong pieces and is left alone", "origin", w.src.Name(), "digest", f.m.Digest)
					return
				}
			}
			if !w.pause(w.backoff()) {
				return
			}
			continue
		}
		w.fails = 0
		w.resize(n, time.Since(began))
		for ; w.idle > 0 && (!f.readerWaits() || time.Since(w.began) > headStart); w.idle-- {
			another := &worker{f: f, src: w.src, size: w.size, answered: time.Now()}
			f.wg.Go(another.run)
		}
		if wait > 0 && !w.pause(wait) {
			return
		}
	}
}

// next decides what to read now: leased pieces, or, where the source can't be asked for a lease or holds leases back,
// missing ones without. A source that answers "later" is not stalled, however long nothing comes: in a large crowd on
// slow links the first pieces take many seconds to reach all, and agents that read what they like meanwhile keep the
// origin from sending what nobody has yet.
func (w *worker) next() (pieces []int, wait time.Duration) {
	f, stall := w.f, w.f.s.cfg.StallTimeout
	v := f.board.look(f.windowPieces(), f.trust(), stall)
	if v.missing == 0 {
		return nil, tick / 2
	}
	n := int(min(max(w.size/f.m.PieceLength(), 1), maxLease))
	ctx, cancel := context.WithTimeout(f.ctx, stall+turnWait)
	defer cancel()
	pieces, wait, err := w.src.Lease(ctx, f.m, LeaseRequest{Have: v.have, Want: v.want, Max: n, Alone: f.alone(), Stalled: f.idle() >= stall})
	if err != nil && f.ctx.Err() == nil {
		f.s.log.Debug("no lease", "origin", w.src.Name(), "digest", f.m.Digest, "error", err)
	}
	silent := time.Since(w.answered)
	heldBack := errors.Is(err, ErrHeldBack)
	if err == nil || heldBack || errors.Is(err, ErrNotLeased) {
		w.answered = time.Now()
	}
	if w.heldBack++; !heldBack {
		w.heldBack = 0
	}
	switch {
	case err == nil && len(pieces) > 0:
		return pieces, wait
	case err == nil, heldBack && w.heldBack < maxHeldBack:
		return nil, max(wait, tick/2)
	case heldBack:
		return v.someMissing(n), 0
	case f.idle() >= stall && errors.Is(err, ErrNotLeased):
		return v.firstMissing(n), 0
	case f.idle() >= stall && silent >= stall:
		return v.someMissing(n), 0
	}
	return nil, w.backoff()
}

// alone says that no peer but origins is known.
func (f *Fetch) alone() bool {
	if !f.board.availableSince().IsZero() {
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

// trust is how many bytes the connected peers are expected to deliver soon.
func (f *Fetch) trust() int64 {
	since := f.board.availableSince()
	if since.IsZero() || time.Since(since) < grace {
		return f.m.Size
	}
	return int64(float64(f.rate.Load()) * horizon.Seconds())
}

// firstMissing lists the n most urgent pieces that are not in have.
func (v view) firstMissing(n int) []int {
	out := v.want[:min(n, len(v.want))]
	for i := 0; i < v.have.Len() && len(out) < n; i++ {
		if !v.have.Has(i) && !slices.Contains(v.want, i) {
			out = append(out, i)
		}
	}
	return out
}

// someMissing lists up to n neighbouring pieces that are not in have, from any on: if all agents of a crowd read the
// same pieces they would have nothing to trade.
func (v view) someMissing(n int) (out []int) {
	skip := rand.IntN(v.missing)
	for i := range v.have.Len() {
		switch {
		case !v.have.Has(i) && skip > 0:
			skip--
		case !v.have.Has(i):
			if out = append(out, i); len(out) == n {
				return out
			}
		case len(out) > 0:
			return out
		}
	}
	return out
}

func (w *worker) backoff() time.Duration {
	d := 250 * time.Millisecond << min(w.fails, 5)
	w.fails++
	return min(d, 5*time.Second)
}

// resize makes the next lease last about leaseTime.
func (w *worker) resize(n int64, took time.Duration) {
	switch {
	case took < leaseTime/2 && n >= w.size/2:
		w.size = min(w.size*2, leaseLimit)
	case took > leaseTime*2:
		w.size = max(w.size/2, w.f.m.PieceLength())
	}
}

// enter waits for a slot of the source, behind all who wait already. False: the Fetch is over.
func (w *worker) enter() bool {
	w.leave()
	select {
	case w.f.s.slots.of(w.src) <- struct{}{}:
		w.in = true
	case <-w.f.ctx.Done():
	}
	return w.f.ctx.Err() == nil
}

func (w *worker) leave() {
	if w.in {
		w.in = false
		<-w.f.s.slots.of(w.src)
	}
}

// slots bound how many workers of all Fetches ask or read one source at once.
type slots struct {
	mu    sync.Mutex
	taken map[string]chan struct{} // of each source, by name
}

func (x *slots) of(src Source) chan struct{} {
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
			w.f.board.release(claimed)
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
		busy := float64(f.whole.Load())*w.stall.Seconds() >= minProgress
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
		if [sha1.Size]byte(h.Sum(nil)) != m.PieceHash(i) {
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
