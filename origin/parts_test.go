package origin

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// slowSource is a blob behind a link of a rate for all bodies together, and one for each.
type slowSource struct {
	b        []byte
	link     int // bytes a second of all bodies
	each     int // of one
	noRanges bool
	cut      func(n int) int // nil, or after how many bytes the n-th body ends; -1: not
	most     int             // 0, or how many bodies may be open at once
	slots    chan struct{}   // nil, or one for each of these: made by the bubble that waits for them
	silent   bool            // who asks for a part is not answered

	mu    sync.Mutex
	opens []int64 // offsets
	open_ int
}

func (s *slowSource) open(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	if s.slots != nil {
		select {
		case s.slots <- struct{}{}:
		case <-ctx.Done():
			return nil, 0, context.Cause(ctx)
		}
	}
	return s.begin(off, n)
}

func (s *slowSource) openAhead(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	if s.silent {
		<-ctx.Done()
		return nil, 0, context.Cause(ctx)
	}
	if s.slots != nil {
		select {
		case s.slots <- struct{}{}:
		default:
			return nil, 0, errors.New("as many are open as may be")
		}
	}
	return s.begin(off, n)
}

func (s *slowSource) begin(off, n int64) (io.ReadCloser, int64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opens = append(s.opens, off)
	size := int64(len(s.b))
	if n < 0 {
		n = size - off
	}
	var err error
	if s.noRanges && off > 0 {
		off, n, err = 0, size, errNoRange
	}
	s.open_++
	body := &slowBody{s: s, r: bytes.NewReader(s.b[off : off+n]), left: -1}
	if s.cut != nil {
		body.left = s.cut(len(s.opens))
	}
	return body, size, err
}

type slowBody struct {
	s      *slowSource
	r      io.Reader
	left   int
	closed sync.Once
	gone   bool
}

func (b *slowBody) Read(p []byte) (int, error) {
	const step = 16 << 10
	b.s.mu.Lock()
	rate := min(b.s.each, b.s.link/max(1, b.s.open_))
	gone := b.gone
	b.s.mu.Unlock()
	if gone {
		return 0, errors.New("closed")
	}
	k := min(len(p), step)
	if b.left >= 0 {
		k = min(k, b.left)
		if k == 0 {
			return 0, io.EOF
		}
	}
	n, err := b.r.Read(p[:k])
	if b.left >= 0 {
		b.left -= n
	}
	time.Sleep(time.Duration(n) * time.Second / time.Duration(rate))
	return n, err
}

func (b *slowBody) Close() error {
	b.closed.Do(func() {
		b.s.mu.Lock()
		defer b.s.mu.Unlock()
		b.gone = true
		b.s.open_--
		if b.s.slots != nil {
			<-b.s.slots
		}
	})
	return nil
}

func TestParts(t *testing.T) {
	b := make([]byte, 96<<20)
	rand.NewChaCha8([32]byte{1}).Read(b)
	const mib = 1 << 20
	for name, c := range map[string]struct {
		s       *slowSource
		most    time.Duration
		opens   int // at most
		atLeast int
	}{
		"one stream fills the link":     {&slowSource{link: 10 * mib, each: 10 * mib}, 10 * time.Second, 8, 1},
		"each stream is slow":           {&slowSource{link: 40 * mib, each: 10 * mib}, 6 * time.Second, 20, 6},
		"ranges are ignored":            {&slowSource{link: 40 * mib, each: 10 * mib, noRanges: true}, 10 * time.Second, 5, 1},
		"bodies break off":              {&slowSource{link: 40 * mib, each: 10 * mib, cut: func(n int) int { return []int{-1, -1, 5 * mib}[n%3] }}, 9 * time.Second, 60, 6},
		"one may be open":               {&slowSource{link: 40 * mib, each: 10 * mib, most: 1}, 10 * time.Second, 2, 1},
		"two may be open":               {&slowSource{link: 40 * mib, each: 10 * mib, most: 2}, 8 * time.Second, 20, 4},
		"parts are not answered":        {&slowSource{link: 40 * mib, each: 10 * mib, silent: true}, 20 * time.Second, 2, 1},
		"all break off, and few do not": {&slowSource{link: 10 * mib, each: 10 * mib, cut: func(int) int { return 3 * mib }}, 20 * time.Second, 60, 30},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := c.s
				s.b = b
				if s.most > 0 {
					s.slots = make(chan struct{}, s.most)
				}
				r := newParts(t.Context(), s, int64(len(b)))
				r.ahead.slots = make(segmentSlots, maxSegments)
				began := time.Now()
				got, err := io.ReadAll(r)
				if err != nil || !bytes.Equal(got, b) {
					t.Fatalf("%d of %d bytes: %v", len(got), len(b), err)
				}
				took := time.Since(began)
				r.Close()
				if took > c.most || len(s.opens) > c.opens || len(s.opens) < c.atLeast {
					t.Errorf("it took %s with %d requests, want %s with %d to %d", took, len(s.opens), c.most, c.atLeast, c.opens)
				}
				if len(r.ahead.slots) != 0 || s.open_ != 0 {
					t.Errorf("%d slots are taken, %d bodies open", len(r.ahead.slots), s.open_)
				}
			})
		})
	}
}

// Blobs of one registry share what may be open there: none may hold what another one, or its own reading ahead, waits
// for.
func TestPartsShareARegistry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const mib = 1 << 20
		slots := make(chan struct{}, 2)
		ahead := make(segmentSlots, maxSegments)
		var wg sync.WaitGroup
		for i := range 4 {
			wg.Go(func() {
				s := &slowSource{b: make([]byte, (96-40*(i/2))*mib), link: 80 * mib, each: 30 * mib, slots: slots}
				r := newParts(t.Context(), s, int64(len(s.b)))
				defer r.Close()
				r.ahead.slots = ahead
				if n, err := io.Copy(io.Discard, r); n != int64(len(s.b)) || err != nil {
					t.Errorf("blob %d: %d of %d bytes: %v", i, n, len(s.b), err)
				}
			})
		}
		wg.Wait()
		if len(slots) != 0 || len(ahead) != 0 {
			t.Errorf("%d slots of the registry and %d of reading ahead are taken", len(slots), len(ahead))
		}
	})
}

func TestPartsGiveUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &slowSource{b: make([]byte, 1<<20), link: 1 << 20, each: 1 << 20, cut: func(int) int { return 0 }}
		r := newParts(t.Context(), s, 1<<20)
		defer r.Close()
		if _, err := io.ReadAll(r); !errors.Is(err, io.ErrUnexpectedEOF) || len(s.opens) != readTries {
			t.Errorf("after %d requests: %v", len(s.opens), err)
		}
	})
}
