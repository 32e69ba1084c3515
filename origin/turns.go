package origin

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"
)

const (
	// ahead is for how long the uplink is given work in advance: what is leased and not sent yet is at most what goes out in this time.
	ahead = 250 * time.Millisecond
	// leastAhead is what is leased in advance in any case, and while the uplink's rate is not known.
	leastAhead = 256 << 10
	// turnWait is how long an agent waits for its turn until it is told to ask again. It keeps its place for placeTime.
	turnWait, placeTime = time.Second, 2 * time.Second
	// A lease that was not sent in turnLimit and twice the time that it and those before it need keeps nobody waiting any more.
	turnLimit = time.Second
	// rateStep is how often the uplink's rate is taken, and rateTime for how long the highest counts at least.
	rateStep, rateTime = 100 * time.Millisecond, 5 * time.Second
	// maxPlaces bounds how many agents' places are kept.
	maxPlaces = 4096
)

// turns make agents lease one after another where the uplink is what bounds them all. If all who ask were answered at once, their pieces
// would share the uplink, and none could be traded before all have come: with 16 agents that is the time of 16 leases. The uplink's
// rate is measured, so that on a fast one nobody waits. They are for all blobs of an origin, which share the uplink.
type turns struct {
	mu      sync.Mutex
	open    []grant // leased and not sent yet, oldest first
	pending int64   // their bytes
	waiting []*waiter
	places  map[string]place // of agents that were told to ask again
	changed chan struct{}    // closed and replaced when a turn may have come

	// The uplink's rate is the highest of late, in bytes a second: a lower one may be because little was asked for. 0: not known.
	rate, last float64   // in this rateTime and in the one before
	began      time.Time // of this rateTime
	since      time.Time // of the last measurement
	sent       int64     // since then
}

// grant is a lease on its way.
type grant struct {
	bytes int64
	until time.Time
}

type waiter struct{ since time.Time }

// place is that of an agent which began to wait at since, and was told at left to ask again.
type place struct{ since, left time.Time }

func newTurns() *turns {
	return &turns{places: map[string]place{}, changed: make(chan struct{})}
}

// take waits for an agent's turn, at most turnWait, and returns how many pieces of a length it may lease: 1 to most, and 0 when its turn
// has not come. The pieces count as on their way from here on; what is not leased of them is given back with leased.
func (t *turns) take(ctx context.Context, agent string, piece int64, most int) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.queue(agent)
	defer t.leave(w)
	limit := time.NewTimer(turnWait)
	defer limit.Stop()
	for {
		now := time.Now()
		t.expire(now)
		if room := t.window() - t.pending; t.waiting[0] == w && room > 0 {
			delete(t.places, agent)
			// All who wait share the room.
			n := min(most, max(1, int(room/int64(len(t.waiting))/piece)))
			bytes := int64(n) * piece
			if t.pending == 0 && now.Sub(t.since) > rateStep {
				t.since, t.sent = now, 0 // it was idle
			}
			t.pending += bytes
			t.open = append(t.open, grant{bytes, now.Add(turnLimit + t.lasts(2*t.pending))})
			return n
		}
		changed := t.changed
		var lapse <-chan time.Time
		if len(t.open) > 0 {
			lapse = time.After(t.open[0].until.Sub(now))
		}
		t.mu.Unlock()
		over := false
		select {
		case <-changed:
		case <-lapse:
		case <-limit.C:
			over = true
		case <-ctx.Done():
			over = true
		}
		t.mu.Lock()
		if over {
			if len(t.places) < maxPlaces {
				t.places[agent] = place{w.since, time.Now()}
			}
			return 0
		}
	}
}

// queue adds an agent to those who wait, at its old place if it has waited until lately.
func (t *turns) queue(agent string) *waiter {
	now := time.Now()
	if len(t.places) >= maxPlaces {
		maps.DeleteFunc(t.places, func(_ string, p place) bool { return now.Sub(p.left) > placeTime })
	}
	w := &waiter{since: now}
	if p, ok := t.places[agent]; ok && now.Sub(p.left) <= placeTime {
		w.since = p.since
	}
	at := len(t.waiting)
	for at > 0 && t.waiting[at-1].since.After(w.since) {
		at--
	}
	t.waiting = slices.Insert(t.waiting, at, w)
	return w
}

func (t *turns) leave(w *waiter) {
	i := slices.Index(t.waiting, w)
	t.waiting = slices.Delete(t.waiting, i, i+1)
	t.wake()
}

func (t *turns) wake() {
	close(t.changed)
	t.changed = make(chan struct{})
}

// window is how many bytes may be on their way.
func (t *turns) window() int64 { return max(leastAhead, int64(max(t.rate, t.last)*ahead.Seconds())) }

// lasts is how long the uplink takes for n bytes.
func (t *turns) lasts(n int64) time.Duration {
	rate := max(t.rate, t.last)
	if rate == 0 {
		return 0
	}
	return time.Duration(min(float64(n)/rate, leaseFor.Seconds()) * float64(time.Second))
}

func (t *turns) expire(now time.Time) {
	for len(t.open) > 0 && !now.Before(t.open[0].until) {
		t.pending -= t.open[0].bytes
		t.open = t.open[1:]
	}
}

// back takes n bytes off the oldest leases.
func (t *turns) back(n int64) {
	for len(t.open) > 0 && n > 0 {
		k := min(n, t.open[0].bytes)
		n -= k
		t.pending -= k
		if t.open[0].bytes -= k; t.open[0].bytes == 0 {
			t.open = t.open[1:]
		}
	}
	t.wake()
}

// unused gives back what was taken and is not leased.
func (t *turns) unused(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.back(n)
}

// done notes that n bytes of leases were sent.
func (t *turns) done(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.sent += n
	if took := now.Sub(t.since); took >= rateStep {
		if now.Sub(t.began) > rateTime {
			t.rate, t.last, t.began = 0, t.rate, now
		}
		t.rate = max(t.rate, float64(t.sent)/took.Seconds())
		t.since, t.sent = now, 0
	}
	t.back(n)
}
