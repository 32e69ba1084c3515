package transport

import (
	"context"
	"errors"
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

var (
	errHedge = errors.New("refused")
	errFinal = errors.New("nobody has it")
)

// TestAsk: parties answer after a time, with an error or without; a negative time never.
func TestAsk(t *testing.T) {
	const never = -1
	ms := time.Millisecond
	type party struct {
		after time.Duration
		err   error
	}
	tests := []struct {
		name    string
		parties []party
		want    int
		got     []int
		silent  []int
		final   error
		took    time.Duration
	}{
		{"the first answers", []party{{after: ms}, {after: ms}, {after: ms}}, 1, []int{0}, nil, nil, ms},
		{"two are wanted", []party{{after: ms}, {after: 2 * ms}, {after: ms}}, 2, []int{0, 1}, nil, nil, 2 * ms},
		{"the first refuses", []party{{ms, errHedge}, {after: ms}}, 1, []int{1}, nil, nil, 2 * ms},
		{"the first hangs", []party{{after: never}, {after: ms}}, 1, []int{1}, []int{0}, nil, 101 * ms},
		{"the first is slow, and first all the same", []party{{after: 120 * ms}, {after: 300 * ms}}, 1, []int{0}, []int{1}, nil, 120 * ms},
		{"one of two hangs", []party{{after: never}, {after: ms}, {after: ms}}, 2, []int{1, 2}, []int{0}, nil, 102 * ms},
		{"one of two hangs, and nobody else is left", []party{{after: never}, {after: ms}}, 2, []int{1}, []int{0}, nil, 1001 * ms},
		{"one is slower than the hedge, and nobody else is left", []party{{after: 900 * ms}, {after: ms}}, 2, []int{1, 0}, nil, nil, 900 * ms},
		{"nobody succeeds", []party{{ms, errHedge}, {ms, errHedge}}, 1, nil, nil, nil, 2 * ms},
		{"all are slow: waited for", []party{{after: 5000 * ms}, {after: 6000 * ms}}, 1, []int{0}, []int{1}, nil, 5000 * ms},
		{"an answer for all", []party{{ms, errFinal}, {after: ms}}, 1, nil, nil, errFinal, ms},
		{"nobody to ask", nil, 1, nil, nil, nil, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ids := make([]int, len(tt.parties))
				for i := range ids {
					ids[i] = i
				}
				began := time.Now()
				out := Ask(t.Context(), ids, Hedge{Want: tt.want, After: 100 * ms, Stall: time.Second}, Question[int, int]{Ask: func(ctx context.Context, i int) (int, error) {
					if tt.parties[i].after == never {
						<-ctx.Done()
						return 0, ctx.Err()
					}
					select {
					case <-time.After(tt.parties[i].after):
						return i, tt.parties[i].err
					case <-ctx.Done():
						return 0, ctx.Err()
					}
				}, IsFinal: func(err error) bool { return err == errFinal }})
				var got []int
				for _, a := range out.Answers {
					got = append(got, a.Value)
				}
				if !slices.Equal(got, tt.got) || !slices.Equal(out.Silent, tt.silent) || out.Final != tt.final {
					t.Errorf("answers of %v, silent %v, final %v; want %v, %v, %v", got, out.Silent, out.Final, tt.got, tt.silent, tt.final)
				}
				if took := time.Since(began); took != tt.took {
					t.Errorf("took %s, want %s", took, tt.took)
				}
			})
		})
	}
}

// An answer that comes when nobody waits for it any more is given back.
func TestAskDiscards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var late []int
		Ask(t.Context(), []int{0, 1}, Hedge{Want: 1, After: time.Second, Stall: time.Second}, Question[int, int]{Ask: func(ctx context.Context, i int) (int, error) {
			if i == 0 {
				<-ctx.Done() // and answers all the same
			}
			return i, nil
		}, Discard: func(i int) { late = append(late, i) }})
		if !slices.Equal(late, []int{0}) {
			t.Errorf("%v were given back, want [0]", late)
		}
	})
}

// Those who were silent before are not waited for as long as others, once somebody has succeeded.
func TestAskOfTheSilent(t *testing.T) {
	for _, c := range []struct {
		name          string
		silent, hangs []int
		took          time.Duration
	}{
		{"two hang, nobody knew", nil, []int{1, 2}, 1100 * time.Millisecond},
		{"two hang, and did before", []int{1, 2}, []int{1, 2}, 200 * time.Millisecond},
		{"one of them did not", []int{1}, []int{1, 2}, 1100 * time.Millisecond},
		{"all hang, and did before", []int{0, 1, 2}, []int{0, 1, 2}, 60 * time.Second},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
				defer cancel()
				began := time.Now()
				out := Ask(ctx, []int{0, 1, 2}, Hedge{Want: 2, After: 100 * time.Millisecond, Stall: time.Second}, Question[int, int]{Ask: func(ctx context.Context, i int) (int, error) {
					if slices.Contains(c.hangs, i) {
						<-ctx.Done()
						return 0, ctx.Err()
					}
					return i, nil
				}, IsSilent: func(i int) bool { return slices.Contains(c.silent, i) }})
				if took := time.Since(began); took != c.took || len(out.Answers) != 3-len(c.hangs) {
					t.Errorf("took %s, want %s; %d answers", took, c.took, len(out.Answers))
				}
			})
		})
	}
}

// What ends the caller ends it, with the reason.
func TestAskEndsWithItsCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		out := Ask(ctx, []int{0}, Hedge{Want: 1, After: time.Minute, Stall: time.Minute}, Question[int, int]{Ask: func(ctx context.Context, i int) (int, error) {
			<-ctx.Done()
			return 0, ctx.Err()
		}})
		if !errors.Is(out.Final, context.DeadlineExceeded) || len(out.Answers) > 0 {
			t.Errorf("ended with %v and %d answers", out.Final, len(out.Answers))
		}
	})
}
