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
	// A lease that nobody begins to fetch within fetchLimit keeps nobody waiting any more, and one that was not sent in turnLimit and
	// twice the time that it and those before it need.
	fetchLimit, turnLimit = 250 * time.Millisecond, time.Second
	// The uplink's rate is taken after rateStep of sending or after rateBytes; the highest counts for rateTime at least.
	rateStep, rateBytes, rateTime = 100 * time.Millisecond, 4 << 20, 5 * time.Second
	// shortest is what a shorter time of sending counts as: a queue behind the kernel may have taken the bytes.
	shortest = 10 * time.Millisecond
	// maxPlaces bounds how many agents' places are kept.
	maxPlaces = 4096
)

// turns make agents lease one after another where the uplink is what bounds them all. If all who ask were answered at once, their pieces
// would share the uplink, and none could be traded before all have come: with 16 agents that is the time of 16 leases. The uplink's
// rate is measured, so that on a fast one nobody waits. They are for all blobs of an origin, which share the uplink.
type turns struct {
	mu      sync.Mutex
	open    []*grant // leased and not sent yet, oldest first
	pending int64    // their bytes
	waiting []*waiter
	places  map[string]place // of agents that were told to ask again
	changed chan struct{}    // closed and replaced when a turn may have come

	// The uplink's rate is the highest of late, in bytes a second: a lower one may be because little was asked for. 0: not known.
	rate, last float64       // in this rateTime and in the one before
	began      time.Time     // of this rateTime
	since      time.Time     // when something began to be on its way, or of the last measurement
	busy       time.Duration // since the last measurement, up to when nothing was on its way
	sent       int64         // since the last measurement
}

// grant is what was leased, or a part of it that is being fetched.
type grant struct {
	bytes   int64
	until   time.Time
	fetched bool
}

type waiter struct{ since time.Time }

// place is that of an agent which began to wait at since, and was told at left to ask again.
type place struct{ since, left time.Time }

func newTurns() *turns {
	return &turns{places: map[string]place{}, changed: make(chan struct{})}
}

// take waits for an agent's turn, at most turnWait, and returns how many pieces of a length it may lease: 1 to most, and 0 when its turn
// has not come. The pieces count as on their way from here on; what is not leased of them is given back with unused.
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
			t.add(&grant{bytes: int64(n) * piece, until: now.Add(fetchLimit)})
			return n
		}
		changed := t.changed
		var lapse <-chan time.Time
		if len(t.open) > 0 {
			first := slices.MinFunc(t.open, func(a, b *grant) int { return a.until.Compare(b.until) })
			lapse = time.After(first.until.Sub(now))
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

func (t *turns) add(g *grant) {
	if len(t.open) == 0 {
		t.since = time.Now()
	}
	t.open = append(t.open, g)
	t.pending += g.bytes
}

// rest ends a time in which something was on its way.
func (t *turns) rest(now time.Time) {
	t.busy += now.Sub(t.since)
	t.since = now
}

// expire forgets leases that ran out.
func (t *turns) expire(now time.Time) {
	if len(t.open) == 0 {
		return
	}
	t.open = slices.DeleteFunc(t.open, func(g *grant) bool {
		if now.Before(g.until) {
			return false
		}
		t.pending -= g.bytes
		return true
	})
}

// unfetched takes n bytes off the leases that nobody fetches yet.
func (t *turns) unfetched(n int64) {
	t.open = slices.DeleteFunc(t.open, func(g *grant) bool {
		if g.fetched {
			return false
		}
		k := min(n, g.bytes)
		n -= k
		t.pending -= k
		g.bytes -= k
		return g.bytes == 0
	})
}

// unused gives back n bytes that were taken and not leased.
func (t *turns) unused(n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unfetched(n)
	t.wake()
}

// fetch notes that n leased bytes are being fetched. sent is called when they were sent, or never will be.
func (t *turns) fetch(n int64) (sent func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unfetched(n)
	g := &grant{bytes: n, until: time.Now().Add(turnLimit + t.lasts(2*(t.pending+n))), fetched: true}
	t.add(g)
	return func() { t.sentAll(g) }
}

func (t *turns) sentAll(g *grant) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.sent += g.bytes
	t.rest(now)
	if i := slices.Index(t.open, g); i >= 0 {
		t.open = slices.Delete(t.open, i, i+1)
		t.pending -= g.bytes
	}
	if t.busy >= rateStep || t.sent >= rateBytes {
		if now.Sub(t.began) > rateTime {
			t.rate, t.last, t.began = 0, t.rate, now
		}
		t.rate = max(t.rate, float64(t.sent)/max(t.busy, shortest).Seconds())
		t.busy, t.sent = 0, 0
	}
	t.wake()
}
