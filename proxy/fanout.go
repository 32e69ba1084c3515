package proxy

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

// Memory of one upload: blocks are shared by the branches, so it is bounded by (queue + 2) blocks whatever the body's
// size.
const (
	blockSize   = 128 << 10
	branchQueue = 4
)

var (
	errStalled = errors.New("no progress, left behind")
	errOver    = errors.New("nobody waits for this copy any more")
)

// block is a piece of a body on its way to every branch; the last one that is done with it gives it back.
type block struct {
	b    []byte
	refs atomic.Int32
}

var blocks = sync.Pool{New: func() any { return &block{b: make([]byte, blockSize)} }}

func (b *block) release() {
	if b.refs.Add(-1) == 0 {
		b.b = b.b[:cap(b.b)]
		blocks.Put(b)
	}
}

// branch is the body as one destination reads it.
type branch struct {
	ctx    context.Context
	cancel context.CancelCauseFunc
	in     chan *block
	end    error // what Read returns after in was closed; set before the close

	// net/http may read a body after it has given the answer.
	mu   sync.Mutex // held while reading
	over bool
	cur  *block
	off  int

	done chan struct{} // closed when send returned
	err  error         // of send; read after done
}

// Read is called by the destination's HTTP client.
func (b *branch) Read(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.wait(); err != nil {
		return 0, err
	}
	n := copy(p, b.cur.b[b.off:])
	if b.off += n; b.off == len(b.cur.b) {
		b.cur.release()
		b.cur = nil
	}
	return n, nil
}

// WriteTo is how the destination's HTTP client takes a body of unknown length: block by block, without a copy and with
// one chunk for each.
func (b *branch) WriteTo(w io.Writer) (n int64, err error) {
	for {
		blk, off, err := b.take()
		if err == io.EOF {
			return n, nil
		}
		if err != nil {
			return n, err
		}
		k, err := w.Write(blk.b[off:])
		blk.release()
		n += int64(k)
		if err != nil {
			return n, err
		}
	}
}

// take waits for a block, which the caller releases: the lock is not held while it is written.
func (b *branch) take() (blk *block, off int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.wait(); err != nil {
		return nil, 0, err
	}
	blk, b.cur = b.cur, nil
	return blk, b.off, nil
}

// wait returns when there is a current block; the lock is held.
func (b *branch) wait() error {
	if b.over {
		return errOver
	}
	for b.cur == nil {
		select {
		case blk, ok := <-b.in:
			if !ok {
				return b.end
			}
			b.cur, b.off = blk, 0
		case <-b.ctx.Done():
			return context.Cause(b.ctx)
		}
	}
	return nil
}

// put hands blk over. False: the branch is over, or made no progress for so long that it was left behind.
func (b *branch) put(blk *block, stall time.Duration) bool {
	select {
	case <-b.done:
		return false
	default:
	}
	select {
	case b.in <- blk:
		return true
	default:
	}
	t := time.NewTimer(stall)
	defer t.Stop()
	select {
	case b.in <- blk:
		return true
	case <-b.done:
	case <-t.C:
		b.cancel(errStalled)
	}
	return false
}

// destinations are what a body is streamed to.
type destinations struct {
	n     int
	stall time.Duration
	// send gives r to destination i: it must read r to its end or return.
	send func(ctx context.Context, i int, r io.Reader) error
	// hangs reports whether destination i answers nothing at all for stall; it returns false when ctx ends.
	hangs func(ctx context.Context, i int) bool
}

// fanOut streams body to all destinations at once, in one pass and without storing it. A destination that takes nothing
// for stall is cancelled and left behind, and so is one that has not answered when others have, see await; the others
// go on. fanOut returns when every send has returned: an error for each, and the error of reading body, if any.
func fanOut(ctx context.Context, body io.Reader, d destinations) (errs []error, readErr error) {
	n, stall := d.n, d.stall
	branches := make([]*branch, n)
	live := make([]*branch, 0, n)
	for i := range branches {
		bctx, cancel := context.WithCancelCause(ctx)
		b := &branch{ctx: bctx, cancel: cancel, in: make(chan *block, branchQueue), end: errOver, done: make(chan struct{})}
		branches[i], live = b, append(live, b)
		go func() {
			defer close(b.done)
			b.err = d.send(bctx, i, b)
		}()
	}
	for len(live) > 0 && readErr == nil {
		blk := blocks.Get().(*block)
		k, err := io.ReadFull(body, blk.b)
		blk.b = blk.b[:k]
		blk.refs.Store(int32(len(live)) + 1)
		kept := live[:0]
		for _, b := range live {
			if k > 0 && !b.put(blk, stall) {
				blk.release()
				continue
			}
			if k == 0 {
				blk.release()
			}
			kept = append(kept, b)
		}
		live = kept
		blk.release()
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		readErr = err
	}
	for _, b := range live { // only these were given the whole body
		if b.end = io.EOF; readErr != nil {
			b.end = readErr
		}
	}
	for _, b := range branches {
		close(b.in)
	}
	await(branches, d)
	errs = make([]error, n)
	for i, b := range branches {
		if errs[i] = b.err; b.err != nil && errors.Is(context.Cause(b.ctx), errStalled) {
			errs[i] = errStalled
		}
		b.cancel(nil)
		b.drain()
	}
	return errs, readErr
}

// await waits until every branch is done. What was sent to those that are not may wait in the buffers of a connection
// to a machine that is gone, so they are cancelled once one has succeeded, after stall more, or after twice the time
// that it took. Once one has failed, while none has succeeded, each of the others may be all there is: it is cancelled
// if it hangs, and waited for if it is slow.
func await(branches []*branch, d destinations) {
	ends := make(chan *branch, len(branches))
	for _, b := range branches {
		go func() {
			<-b.done
			ends <- b
		}()
	}
	var looking sync.WaitGroup
	defer looking.Wait()
	var over <-chan time.Time
	began, looked := time.Now(), false
	for range branches {
		select {
		case b := <-ends:
			if b.err == nil && over == nil {
				t := time.NewTimer(max(d.stall, time.Since(began)))
				defer t.Stop()
				over = t.C
			}
			if over == nil && !looked {
				looked = true
				for i, b := range branches {
					looking.Go(func() { b.leaveIf(func(ctx context.Context) bool { return d.hangs(ctx, i) }) })
				}
			}
		case <-over:
			for _, b := range branches {
				b.leave()
			}
			<-ends
		}
	}
}

// leaveIf cancels a branch that is not done when hangs says so, which is told when the branch is done.
func (b *branch) leaveIf(hangs func(context.Context) bool) {
	select {
	case <-b.done:
		return
	default:
	}
	ctx, cancel := context.WithCancel(b.ctx)
	defer cancel()
	go func() {
		select {
		case <-b.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	if hangs(ctx) {
		b.leave()
	}
}

// leave cancels a branch that is not done.
func (b *branch) leave() {
	select {
	case <-b.done:
	default:
		b.cancel(errStalled)
	}
}

// drain gives back what the destination did not read. The branch was cancelled, so that no Read waits.
func (b *branch) drain() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.over = true
	if b.cur != nil {
		b.cur.release()
		b.cur = nil
	}
	for blk := range b.in {
		blk.release()
	}
}
