package agent

import (
	"bytes"
	"context"
	"errors"
	"testing"

	"github.com/opencontainers/go-digest"
)

// TestPullTransitions: every event in every state, and what comes of it; "" is what does not happen.
func TestPullTransitions(t *testing.T) {
	names := map[pullState]string{begun: "begun", joined: "joined", retried: "retried", abandoned: "abandoned", verified: "verified", failed: "failed"}
	for _, tc := range []struct {
		state                                          pullState
		published, deserted, tainted, committed, broke string
	}{
		{begun, "joined", "abandoned", "retried", "verified", "failed"},
		{joined, "", "abandoned", "retried", "verified", "failed"},
		{retried, "joined", "abandoned", "", "verified", "failed"},
		{abandoned, "abandoned", "", "", "verified", "failed"},
		{verified, "", "", "", "", ""},
		{failed, "", "", "", "", ""},
	} {
		for event, want := range map[pullEvent]string{published: tc.published, deserted: tc.deserted, tainted: tc.tainted, committed: tc.committed, broke: tc.broke} {
			p := newPull("r", digest.FromString("a blob"))
			p.state = tc.state
			before := p.changed.C()
			p.mu.Lock()
			changed := p.enter(event)
			p.mu.Unlock()
			if changed != (want != "") || changed && names[p.state] != want || !changed && p.state != tc.state {
				t.Errorf("event %d in %s: %v, %s; want %q", event, names[tc.state], changed, names[p.state], want)
			}
			select {
			case <-before:
				if !changed {
					t.Errorf("event %d in %s does not happen, and wakes who waits", event, names[tc.state])
				}
			default:
				if changed {
					t.Errorf("event %d in %s wakes nobody", event, names[tc.state])
				}
			}
		}
	}
}

// closing is a body that counts how often it was closed.
type closing struct {
	heldBody
	n int
}

func (c *closing) close() { c.n++ }

// TestReadersOfAPull drives a pull as its owner does, with a reader that comes at each moment.
func TestReadersOfAPull(t *testing.T) {
	errWrong := errors.New("other bytes")
	bodies := []*closing{{heldBody: heldBody{bytes.NewReader([]byte("first"))}}, {heldBody: heldBody{bytes.NewReader([]byte("second"))}}}
	p := newPull("r", digest.FromString("a blob"))
	publish := func(b *closing) *incoming {
		in := &incoming{p: p, size: b.Size(), body: b, ended: make(chan struct{})}
		p.publish(in)
		return in
	}
	join := func() {
		t.Helper()
		if !p.join() {
			t.Fatal("can't be joined")
		}
	}
	attach := func(want *incoming) *incoming {
		t.Helper()
		in, err := p.body(t.Context())
		if in != want || err != nil {
			t.Fatalf("%v, %v, want %v", in, err, want)
		}
		return in
	}
	unread := func(want bool) {
		t.Helper()
		select {
		case <-p.unread:
			if !want {
				t.Error("the owner is told that nobody reads")
			}
		default:
			if want {
				t.Error("the owner is not told that nobody reads")
			}
		}
	}
	join() // reads the first body
	first := publish(bodies[0])
	attach(first)
	join() // is about to read when the first try ends, and gets the second one's body
	p.end(tainted, result{err: errWrong})
	if err := first.Verified(t.Context()); !errors.Is(err, errWrong) {
		t.Errorf("who reads the first body is told %v", err)
	}
	if bodies[0].n > 0 {
		t.Error("the first body was closed while it is read")
	}
	first.leave()
	unread(false) // it read what is over, and the other one waits
	if bodies[0].n != 1 {
		t.Errorf("the first body was closed %d times", bodies[0].n)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	join()
	if in, err := p.body(gone); in != nil || !errors.Is(err, context.Canceled) {
		t.Errorf("a reader that has gone got %v, %v", in, err)
	}
	unread(false)
	second := publish(bodies[1])
	attach(second).leave()
	unread(true)
	join()
	if p.abandon() {
		t.Error("it is abandoned although somebody has joined meanwhile")
	}
	p.end(committed, result{})
	if p.join() {
		t.Error("it can be joined when it is over")
	}
	if bodies[1].n > 0 {
		t.Error("the second body was closed although a reader is about to read it")
	}
	attach(second).leave()
	if err := second.Verified(t.Context()); err != nil || bodies[1].n != 1 {
		t.Errorf("at the end: %v, the second body was closed %d times", err, bodies[1].n)
	}
	select {
	case <-p.ended:
	default:
		t.Error("it has not ended")
	}
}

// TestAbandoning: what is given up when the last reader has gone.
func TestAbandoning(t *testing.T) {
	left := func(n int64) report { return report{size: 100, missing: func() int64 { return n }} }
	for name, tc := range map[string]struct {
		report report
		read   bool
		want   bool
	}{
		"nothing is known":       {report{}, false, true},
		"more than half is gone": {left(51), false, true},
		"half is there":          {left(50), false, false},
		"somebody has come":      {left(51), true, false},
	} {
		p := newPull("r", digest.FromString("a blob"))
		p.report = tc.report
		if tc.read {
			p.join()
		}
		if got := p.abandon(); got != tc.want || got != (p.state == abandoned) {
			t.Errorf("%s: abandoned %v, state %d", name, got, p.state)
		}
		if tc.want && p.join() {
			t.Errorf("%s: an abandoned pull can be joined", name)
		}
	}
}
