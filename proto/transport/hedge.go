package transport

import (
	"context"
	"time"
)

// Hedge is how much patience there is with one of several parties that can all do the same.
type Hedge struct {
	// Want is how many must succeed.
	Want int
	// After is how long the ones that were asked are waited for before one more is asked as well. They may still
	// answer.
	After time.Duration
	// Stall is how long the last ones are waited for once somebody has succeeded and nobody is left to be asked.
	Stall time.Duration
}

// Question is what parties are asked.
type Question[P, T any] struct {
	Ask func(context.Context, P) (T, error)
	// IsFinal reports whether one party's error is everybody's answer; nil: none is.
	IsFinal func(error) bool
	// IsSilent reports whether a party was found not to answer lately; nil: none was. When only such ones are left they
	// are waited for no longer than Hedge.After, once somebody has succeeded.
	IsSilent func(P) bool
	// Discard is given answers that came too late; nil: nothing is to be done with them.
	Discard func(T)
}

// Answer is what one party answered.
type Answer[P, T any] struct {
	From  P
	Value T
}

// Asked is what came of Ask.
type Asked[P, T any] struct {
	Answers []Answer[P, T] // the successes, in the order in which they came
	Errs    []error        // of the parties that failed, in the order in which they did
	Silent  []P            // were not waited for any longer
	Final   error          // the error that ended it, see Ask
}

// Ask asks parties, the first ones first, until h.Want have succeeded: h.Want of them at once, another for each that
// fails, and one more whenever nothing was answered for h.After. It ends early with an error that q.IsFinal says is
// everybody's answer, and when ctx does. A party that is slow costs h.After once, and fails nothing as long as
// another answers.
//
// The context of an ask ends with Ask when the party was silent, and with ctx when it answered. Ask returns when every
// ask has returned.
func Ask[P, T any](ctx context.Context, parties []P, h Hedge, q Question[P, T]) Asked[P, T] {
	a := asking[P, T]{
		ctx: ctx, parties: parties, h: h, q: q,
		ends: make(chan end[T], len(parties)), cancels: make([]context.CancelFunc, len(parties)), open: map[int]bool{},
	}
	for range min(h.Want, len(parties)) {
		a.next()
	}
	a.run()
	if ctx.Err() != nil && len(a.out.Answers) < h.Want {
		a.out.Final = context.Cause(ctx)
	}
	for i := range a.open {
		a.out.Silent = append(a.out.Silent, parties[i])
		a.cancels[i]()
	}
	for range a.open {
		if e := <-a.ends; e.err == nil && q.Discard != nil {
			q.Discard(e.value)
		}
	}
	return a.out
}

// asking is one Ask under way.
type asking[P, T any] struct {
	ctx     context.Context
	parties []P
	h       Hedge
	q       Question[P, T]

	ends    chan end[T]
	asked   int
	cancels []context.CancelFunc
	open    map[int]bool // parties that were asked and have not answered
	out     Asked[P, T]
}

// end is how one ask ended.
type end[T any] struct {
	party int
	value T
	err   error
}

// next asks one more party, if there is one.
func (a *asking[P, T]) next() {
	if a.asked == len(a.parties) {
		return
	}
	i := a.asked
	a.asked++
	ctx, cancel := context.WithCancel(a.ctx)
	a.cancels[i], a.open[i] = cancel, true
	go func() { // Ask waits for it
		v, err := a.q.Ask(ctx, a.parties[i])
		a.ends <- end[T]{i, v, err}
	}()
}

// run waits for answers until there are enough, or none can come any more.
func (a *asking[P, T]) run() {
	t := time.NewTimer(a.patience())
	defer t.Stop()
	for len(a.open) > 0 && len(a.out.Answers) < a.h.Want {
		select {
		case e := <-a.ends:
			delete(a.open, e.party)
			if e.err == nil {
				a.out.Answers = append(a.out.Answers, Answer[P, T]{a.parties[e.party], e.value})
				break
			}
			a.cancels[e.party]()
			if a.q.IsFinal != nil && a.q.IsFinal(e.err) {
				a.out.Final = e.err
				return
			}
			a.out.Errs = append(a.out.Errs, e.err)
			a.next()
		case <-t.C:
			if a.asked == len(a.parties) && len(a.out.Answers) > 0 {
				return
			}
			a.next()
		case <-a.ctx.Done():
			return
		}
		t.Reset(a.patience())
	}
}

// patience is how long to wait now for the next answer.
func (a *asking[P, T]) patience() time.Duration {
	if a.asked < len(a.parties) || len(a.out.Answers) > 0 && a.onlySilent() {
		return a.h.After
	}
	return a.h.Stall
}

// onlySilent reports whether all who are waited for were silent before.
func (a *asking[P, T]) onlySilent() bool {
	for i := range a.open {
		if a.q.IsSilent == nil || !a.q.IsSilent(a.parties[i]) {
			return false
		}
	}
	return true
}
