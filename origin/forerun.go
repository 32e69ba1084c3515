package origin

import (
	"context"
	"sync"
	"time"

	"kraken/origin/store"
)

const (
	// segmentSize is how many bytes a request reads that runs ahead of the one that readers follow, and segmentsEach
	// how many such there are for a blob. All of a process hold maxSegments in memory at most.
	segmentSize, segmentsEach, maxSegments = 8 << 20, 3, 16
	// tryAfter is how long one request reads alone, and tryFor how long others are tried beside it. They stay where
	// they make the whole faster by tryGain: one stream fills most links, and more would only make what readers wait
	// for share it.
	tryAfter, tryFor, tryGain = time.Second, time.Second, 1.3
	// tryFrom is how many bytes must be missing for a try, in segments.
	tryFrom = 8
	// leastKept is how many bytes of a segment that was ended early are worth a further request.
	leastKept = 1 << 20
)

// segmentSlots bound the segments of all fetches of an origin.
type segmentSlots chan struct{}

// forerun reads parts of a blob before they are needed, where that is faster. It belongs to one parts and is used by
// its goroutine.
type forerun struct {
	slots segmentSlots // nil: none are read

	began    time.Time // of the first read
	tried    time.Time // when others were begun
	alone    float64   // the rate of one request, in bytes a second
	at       int64     // position when others were begun
	verdict  bool      // it is known whether they help
	useless  bool
	segments []*segment // in order, neighbours
}

// segment is a part of a blob that is read ahead.
type segment struct {
	off, end int64
	cancel   context.CancelFunc
	over     chan struct{}
	more     store.Signal
	free     func()

	mu   sync.Mutex
	buf  []byte
	done bool
}

// newSegment begins to read [off, end) of what r reads. free is called once it has stopped. It waits for nothing that a
// body of the same place may hold, so that who reads that body may wait for the segment.
func newSegment(r *parts, off, end int64, free func()) *segment {
	s := &segment{off: off, end: end, over: make(chan struct{}), free: free}
	var ctx context.Context
	ctx, s.cancel = context.WithCancel(r.ctx)
	go func() {
		defer close(s.over)
		s.read(ctx, r.from, r.size, r.stall)
		s.mu.Lock()
		s.done = true
		s.mu.Unlock()
		s.more.Wake()
	}()
	return s
}

// read fills the segment. Whatever ends it early, what is missing is read by who comes there.
func (s *segment) read(ctx context.Context, from blobSource, size int64, stall time.Duration) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	hang := time.AfterFunc(stall, cancel)
	defer hang.Stop()
	body, whole, err := from.openAhead(ctx, s.off, s.end-s.off)
	if body == nil {
		return
	}
	var once sync.Once
	shut := func() { once.Do(func() { body.Close() }) }
	defer shut()
	if err != nil || whole != size { // ranges are ignored, or it is another blob
		return
	}
	defer context.AfterFunc(ctx, shut)()
	b := make([]byte, 64<<10)
	for got := s.off; got < s.end; {
		n, err := body.Read(b[:min(int64(len(b)), s.end-got)])
		if n > 0 {
			hang.Reset(stall)
			got += int64(n)
			s.mu.Lock()
			s.buf = append(s.buf, b[:n]...)
			s.mu.Unlock()
			s.more.Wake()
		}
		if err != nil {
			return
		}
	}
}

// brings reports whether there is something at pos, or may come.
func (s *segment) brings(pos int64) bool {
	n, done := s.have()
	return !done || s.off+n > pos
}

// have returns how many bytes have come, and whether no more do.
func (s *segment) have() (n int64, done bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return int64(len(s.buf)), s.done
}

// next copies what has come from pos on, and waits where that is nothing. 0 bytes and no error: no more come.
func (s *segment) next(ctx context.Context, b []byte, pos int64) (int, error) {
	for {
		more := s.more.C()
		s.mu.Lock()
		n, done := copy(b, s.buf[min(pos-s.off, int64(len(s.buf))):]), s.done
		s.mu.Unlock()
		if n > 0 || done {
			return n, nil
		}
		select {
		case <-more:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
}

// stop ends the reading and waits for that.
func (s *segment) stop() {
	s.cancel()
	<-s.over
	if s.free != nil {
		s.free()
		s.free = nil
	}
}

// look begins segments when it is time to try, and judges whether they help.
func (a *forerun) look(r *parts, now time.Time) {
	switch {
	case a.slots == nil || a.useless:
	case a.began.IsZero():
		a.began = now
	case a.tried.IsZero():
		if since := now.Sub(a.began); since >= tryAfter {
			if r.size-r.pos < tryFrom*segmentSize {
				a.useless = true
				return
			}
			a.alone, a.at, a.tried = float64(r.pos)/since.Seconds(), r.pos, now
			a.extend(r)
		}
	case !a.verdict && now.Sub(a.tried) >= tryFor:
		a.verdict = true
		got := r.pos - a.at
		for _, s := range a.segments {
			n, _ := s.have()
			got += n
		}
		if float64(got)/now.Sub(a.tried).Seconds() < a.alone*tryGain {
			a.giveUp()
		}
	}
}

// giveUp ends the reading ahead. What has come is used as far as it is worth a request.
func (a *forerun) giveUp() {
	a.useless = true
	kept := a.segments[:0]
	for _, s := range a.segments {
		s.cancel()
		<-s.over
		if n, _ := s.have(); n >= leastKept {
			s.end = s.off + n
			kept = append(kept, s)
		} else {
			s.stop()
		}
	}
	a.segments = kept
}

// extend begins segments behind those that there are, as many as may be.
func (a *forerun) extend(r *parts) {
	for !a.useless && len(a.segments) < segmentsEach {
		off := r.pos + segmentSize
		if n := len(a.segments); n > 0 {
			off = a.segments[n-1].end
		}
		if off >= r.size {
			return
		}
		select {
		case a.slots <- struct{}{}:
		default:
			return
		}
		a.segments = append(a.segments, newSegment(r, off, min(off+segmentSize, r.size), func() { <-a.slots }))
	}
}

// limit returns up to where the request that readers follow has to read.
func (a *forerun) limit(r *parts) int64 {
	if len(a.segments) > 0 {
		return a.segments[0].off
	}
	return r.size
}

// read reads from the segment at the position, and reports false where there is none.
func (a *forerun) read(r *parts, b []byte) (n int, ok bool, err error) {
	for len(a.segments) > 0 && a.segments[0].off <= r.pos {
		s := a.segments[0]
		if s.brings(r.pos) {
			r.closeBody() // it has come to where others read, and holds nothing while it waits for them
			if n, err = s.next(r.ctx, b[:min(int64(len(b)), s.end-r.pos)], r.pos); n > 0 || err != nil {
				return n, true, err
			}
		}
		s.stop() // used up, broken off, or never begun
		a.segments = a.segments[1:]
		a.extend(r)
	}
	return 0, false, nil
}

// close ends all segments.
func (a *forerun) close() {
	a.useless = true
	for _, s := range a.segments {
		s.stop()
	}
	a.segments = nil
}
