package proxy

import (
	"bytes"
	"context"
	"errors"
	"io"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
)

// to are n destinations that do not hang.
func to(n int, stall time.Duration, send func(ctx context.Context, i int, r io.Reader) error) destinations {
	return destinations{n: n, stall: stall, send: send, hangs: func(context.Context, int) bool { return false }}
}

func TestFanOutCopiesToAll(t *testing.T) {
	for _, size := range []int{0, 1, blockSize, 5*blockSize + 7} {
		body := bytes.Repeat([]byte{7}, size)
		got := make([]bytes.Buffer, 3)
		errs, readErr := fanOut(t.Context(), iotest.HalfReader(bytes.NewReader(body)), to(3, time.Second, func(_ context.Context, i int, r io.Reader) error {
			_, err := got[i].ReadFrom(r)
			return err
		}))
		if readErr != nil || errors.Join(errs...) != nil {
			t.Errorf("%d bytes: %v, %v", size, readErr, errs)
		}
		for i := range got {
			if !bytes.Equal(got[i].Bytes(), body) {
				t.Errorf("destination %d got %d of %d bytes", i, got[i].Len(), size)
			}
		}
	}
}

func TestFanOutLeavesTheStalledBehind(t *testing.T) {
	body := bytes.Repeat([]byte{7}, 20*blockSize)
	var n int64
	errs, readErr := fanOut(t.Context(), bytes.NewReader(body), to(2, 50*time.Millisecond, func(ctx context.Context, i int, r io.Reader) (err error) {
		if i == 0 {
			<-ctx.Done() // takes nothing
			return context.Cause(ctx)
		}
		n, err = io.Copy(io.Discard, r)
		return err
	}))
	if readErr != nil || !errors.Is(errs[0], errStalled) || errs[1] != nil || n != int64(len(body)) {
		t.Errorf("%v, %v; the other got %d of %d bytes", readErr, errs, n, len(body))
	}
}

func TestFanOutGoesOnWithoutTheFailed(t *testing.T) {
	body := bytes.Repeat([]byte{7}, 20*blockSize)
	refused := errors.New("refused")
	var n int64
	errs, _ := fanOut(t.Context(), bytes.NewReader(body), to(2, time.Minute, func(_ context.Context, i int, r io.Reader) (err error) {
		if i == 0 {
			return refused
		}
		n, err = io.Copy(io.Discard, r)
		return err
	}))
	if !errors.Is(errs[0], refused) || errs[1] != nil || n != int64(len(body)) {
		t.Errorf("%v; the other got %d of %d bytes", errs, n, len(body))
	}
}

func TestFanOutTellsOfABrokenBody(t *testing.T) {
	lost := errors.New("client went away")
	body := io.MultiReader(bytes.NewReader(make([]byte, 3*blockSize)), iotest.ErrReader(lost))
	errs, readErr := fanOut(t.Context(), body, to(2, time.Minute, func(_ context.Context, _ int, r io.Reader) error {
		_, err := io.Copy(io.Discard, r)
		return err
	}))
	if !errors.Is(readErr, lost) || !errors.Is(errs[0], lost) || !errors.Is(errs[1], lost) {
		t.Errorf("%v, %v: a destination took a cut body for a whole one", readErr, errs)
	}
}

// To net/http a body that was cut ends with io.ErrUnexpectedEOF, to io.ReadFull one that is no multiple of its buffer.
func TestFanOutTellsCutFromEnded(t *testing.T) {
	for _, size := range []int{0, 10, 3*blockSize + 10} {
		body := io.MultiReader(bytes.NewReader(make([]byte, size)), iotest.ErrReader(io.ErrUnexpectedEOF))
		errs, readErr := fanOut(t.Context(), uncut{body}, to(2, time.Minute, func(_ context.Context, _ int, r io.Reader) error {
			_, err := io.Copy(io.Discard, r)
			return err
		}))
		if !errors.Is(readErr, errCut) || errs[0] == nil || errs[1] == nil {
			t.Errorf("%d bytes: %v, %v: a destination took a cut body for a whole one", size, readErr, errs)
		}
	}
}

// net/http goes on reading a request's body after the answer has come: an origin that answers early must not take the
// process with it.
func TestFanOutSurvivesLateReaders(t *testing.T) {
	var late sync.WaitGroup
	for range 50 {
		body := bytes.Repeat([]byte{7}, 20*blockSize)
		fanOut(t.Context(), bytes.NewReader(body), to(2, time.Minute, func(_ context.Context, i int, r io.Reader) error {
			if i == 1 {
				_, err := io.Copy(io.Discard, r)
				return err
			}
			reading := make(chan struct{})
			late.Go(func() {
				var once sync.Once
				total := 0
				for b := make([]byte, 1000); ; {
					n, err := r.Read(b)
					total += n
					once.Do(func() { close(reading) })
					if err != nil {
						if err == io.EOF && total < len(body) { // it may have been faster than the refusal
							t.Errorf("a body of %d bytes ended clean after %d", len(body), total)
						}
						return
					}
				}
			})
			<-reading
			return errors.New("refused")
		}))
	}
	late.Wait()
}

// A destination that took the whole body and does not answer is waited for a while after another has succeeded. After
// another has failed it is left behind if it hangs, and no time at all is too long if it is slow, as while none has
// answered.
func TestFanOutLeavesBehindWhoDoesNotAnswer(t *testing.T) {
	const stall = 5 * time.Second
	refused := errors.New("refused")
	type answer struct {
		after time.Duration // 0: never
		err   error
		hangs bool
	}
	never := answer{hangs: true}
	tests := []struct {
		name    string
		answers []answer
		stalled []bool
		took    time.Duration
	}{
		{"both at once", []answer{{after: time.Millisecond}, {after: time.Millisecond}}, []bool{false, false}, time.Millisecond},
		{"the second never", []answer{{after: time.Millisecond}, never}, []bool{false, true}, stall + time.Millisecond},
		{"the first never", []answer{never, {after: time.Second}}, []bool{true, false}, stall + time.Second},
		{"both late", []answer{{after: 20 * time.Second}, {after: 39 * time.Second}}, []bool{false, false}, 39 * time.Second},
		{"one more than twice as late", []answer{{after: 20 * time.Second}, {after: 41 * time.Second}}, []bool{false, true}, 40 * time.Second},
		{"one refuses, one hangs", []answer{{after: time.Second, err: refused}, never}, []bool{false, true}, stall + time.Second},
		{"one refuses, one is slow", []answer{{after: 39 * time.Second}, {after: time.Second, err: refused}}, []bool{false, false}, 39 * time.Second},
		{"one refuses, one hangs, one is slow", []answer{never, {after: time.Second, err: refused}, {after: 2 * time.Second}},
			[]bool{true, false, false}, stall + time.Second},
		{"two refuse, one hangs", []answer{never, {after: time.Second, err: refused}, {after: 3 * time.Second, err: refused}},
			[]bool{true, false, false}, stall + time.Second},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				began := time.Now()
				d := to(len(tt.answers), stall, func(ctx context.Context, i int, r io.Reader) error {
					if _, err := io.Copy(io.Discard, r); err != nil {
						return err
					}
					var answer <-chan time.Time
					if tt.answers[i].after > 0 {
						answer = time.After(tt.answers[i].after)
					}
					select {
					case <-answer:
						return tt.answers[i].err
					case <-ctx.Done():
						return ctx.Err()
					}
				})
				d.hangs = func(ctx context.Context, i int) bool {
					if !tt.answers[i].hangs {
						return false
					}
					select {
					case <-time.After(stall):
						return true
					case <-ctx.Done():
						return false
					}
				}
				errs, readErr := fanOut(t.Context(), strings.NewReader("layer"), d)
				for i, err := range errs {
					if errors.Is(err, errStalled) != tt.stalled[i] || !tt.stalled[i] && err != tt.answers[i].err {
						t.Errorf("destination %d: %v", i, err)
					}
				}
				if took := time.Since(began); took != tt.took || readErr != nil {
					t.Errorf("took %s, want %s; %v", took, tt.took, readErr)
				}
			})
		})
	}
}
