package origin

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"kraken/origin/store"
)

const (
	// ahead is for how long the uplink is given work in advance: what is leased and not sent yet is at most what goes
	// out in this time.
	ahead = 250 * time.Millisecond
	// leastAhead is what is leased in advance at least, as far as it goes out in a second: a connection that has rested
	// begins slowly, and few of them leave a slow link idle. initialWindow is the window before the first rate
	// measurement: the first pieces share a slow link with little else, and are traded the sooner.
	leastAhead, initialWindow = 768 << 10, 256 << 10
	// lonePieces is how many pieces an agent may have on its way, whatever the window, where nobody else leases: with
	// large ones the window is less than two, and between one and the next the uplink would rest, which makes it seem
	// slower and the window smaller yet.
	lonePieces = 2
	// turnWait is how long an agent waits for its turn until it is told to ask again. It counts as waiting for
	// placeTime more.
	turnWait, placeTime = time.Second, 2 * time.Second
	// credit bounds by how many bytes an agent that has leased less than others catches up with them.
	credit = 4 << 20
	// A lease that nobody begins to fetch within fetchLimit keeps nobody waiting any more, and one that was not sent in
	// turnLimit and twice the time that it and those before it need.
	fetchLimit, turnLimit = 250 * time.Millisecond, time.Second
	// The uplink's rate is taken after rateStep of sending, or after rateBytes and rateWindows times what may be on its
	// way; the highest counts for rateTime at least. Leases are sent side by side and so end in bunches: over less, the
	// rate of a bunch would be taken for the uplink's.
	rateStep, rateBytes, rateWindows, rateTime = 500 * time.Millisecond, 4 << 20, 4, 5 * time.Second
	// shortest is what a shorter time of sending counts as: a queue behind the kernel may have taken the bytes.
	shortest = 10 * time.Millisecond
	// A piece spreads in the time that the uplink takes for spreadPieces of up to spreadBlock bytes, at most
	// spreadLimit: each of two dozen peers has asked a node for a block, and a block waits for all of these.
	spreadPieces, spreadLimit = 48, 30 * time.Second
	spreadBlock               = 256 << 10
	// maxShares bounds how many agents' shares are kept.
	maxShares = 4096
)

// turns make agents lease one after another where the uplink is what bounds them all. If all who ask were answered at
// once, their pieces would share the uplink, and none could be traded before all have come: with 16 agents that is the
// time of 16 leases. The uplink's rate is measured, so that on a fast one nobody waits. They are for all blobs of an
// origin, which share the uplink.
type turns struct {
	mu      sync.Mutex
	open    []*grant // leased and not sent yet, oldest first
	pending int64    // their bytes
	waiting []*waiter
	front   *waiter           // the one whose turn it is; nil when that is to be found out
	shares  map[string]*share // of agents
	level   int64             // the largest share that a turn began with: where those stand who lease now
	changed store.Signal      // a turn may have come

	// The uplink's rate is the highest of late, in bytes a second: a lower one may be because little was asked for. 0:
	// not known.
	rate, last float64       // in this rateTime and in the one before
	began      time.Time     // of this rateTime
	since      time.Time     // when something began to be on its way, or of the last measurement
	busy       time.Duration // since the last measurement, up to when nothing was on its way
	sentBytes  int64         // since the last measurement
}

// grant is what was leased, or a part of it that is being fetched.
type grant struct {
	bytes   int64
	until   time.Time
	fetched bool
}

// waiter is a request that waits for its agent's turn.
type waiter struct {
	*share
	agent string
	asked time.Time
	last  bool // after all others
}

// share is what an agent has leased, in bytes. One that comes later begins where the others are (start-time fair
// queueing, Goyal 1996).
type share struct {
	leased  int64
	since   time.Time // when it began to wait, if it was told to ask again
	left    time.Time // when it was told so, or had its turn
	waiting int       // requests
}

func newTurns() *turns {
	return &turns{shares: map[string]*share{}}
}

// take waits for an agent's turn, at most turnWait, and returns how many pieces of a length it may lease: 1 to most,
// and 0 when its turn has not come. The pieces count as on their way from here on; what is not leased of them is given
// back with unused.
func (t *turns) take(ctx context.Context, agent string, piece int64, most int) int {
	return t.await(ctx, agent, piece, most, false)
}

// takeLast is take for an agent that does not fetch what it leases: all others come first.
func (t *turns) takeLast(ctx context.Context, agent string, piece int64, most int) int {
	return t.await(ctx, agent, piece, most, true)
}

func (t *turns) await(ctx context.Context, agent string, piece int64, most int, last bool) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.queue(agent)
	w.last = last
	defer t.leave(w)
	limit := time.NewTimer(turnWait)
	defer limit.Stop()
	for {
		now := time.Now()
		t.expire(now)
		room := t.window() - t.pending
		if room <= 0 && t.lone(now, w) { // whom nobody waits for: one piece is on its way, and one comes next
			room = lonePieces*piece - t.pending
		}
		if room > 0 && t.next() == w {
			// All who wait share the room.
			n := min(most, max(1, int(room/int64(len(t.waiting))/piece)))
			t.level = max(t.level, w.leased)
			w.leased += int64(n) * piece
			// there were too many to keep it: else all who are like it would come before the others for ever
			if t.shares[agent] != w.share {
				t.level = max(t.level, w.leased)
			}
			w.since = time.Time{}
			t.add(&grant{bytes: int64(n) * piece, until: now.Add(fetchLimit)})
			return n
		}
		changed := t.changed.C()
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
			if w.since.IsZero() || w.asked.Before(w.since) {
				w.since = w.asked
			}
			return 0
		}
	}
}

// queue adds a request of an agent to those that wait, since the agent's last one if it was told lately to ask again.
func (t *turns) queue(agent string) *waiter {
	now := time.Now()
	s := t.shares[agent]
	if s == nil {
		if len(t.shares) >= maxShares {
			maps.DeleteFunc(t.shares, func(_ string, s *share) bool { return s.gone(now) })
		}
		s = &share{leased: t.level}
		if len(t.shares) < maxShares {
			t.shares[agent] = s
		}
	}
	s.leased = max(s.leased, t.level-credit)
	w := &waiter{share: s, agent: agent, asked: now}
	switch {
	case s.gone(now):
		s.leased, s.since = min(s.leased, t.level), time.Time{} // a debt ends with the rush that it is from
	case !s.since.IsZero():
		w.asked = s.since
	}
	s.waiting++
	t.waiting, t.front = append(t.waiting, w), nil
	return w
}

// lone reports whether nobody but w's agent has waited lately. The caller holds t.mu.
func (t *turns) lone(now time.Time, w *waiter) bool {
	for _, s := range t.shares {
		if s != w.share && !s.gone(now) {
			return false
		}
	}
	return t.shares[w.agent] == w.share
}

// gone reports whether the agent has not waited for placeTime.
func (s *share) gone(now time.Time) bool { return s.waiting == 0 && now.Sub(s.left) > placeTime }

// next returns the request whose turn it is: of who has leased least, then of who waits for longest.
func (t *turns) next() *waiter {
	if t.front == nil {
		t.front = slices.MinFunc(t.waiting, func(a, b *waiter) int {
			if a.last != b.last {
				if a.last {
					return 1
				}
				return -1
			}
			return cmp.Or(cmp.Compare(a.leased, b.leased), a.asked.Compare(b.asked))
		})
	}
	return t.front
}

func (t *turns) leave(w *waiter) {
	w.waiting--
	w.left = time.Now()
	i := slices.Index(t.waiting, w)
	t.waiting, t.front = slices.Delete(t.waiting, i, i+1), nil
	t.changed.Wake()
}

// window returns how many bytes may be on their way. The caller holds t.mu.
func (t *turns) window() int64 {
	rate := max(t.rate, t.last)
	if rate == 0 {
		return initialWindow
	}
	return max(initialWindow, min(leastAhead, int64(rate)), int64(rate*ahead.Seconds()))
}

// spread returns how long a piece of this length in bytes may need to reach the agents of a crowd that trade it, as far
// as the uplink's rate tells how slow their links are. What is sent again sooner is sent to each of them.
func (t *turns) spread(piece int64) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	return min(spreadPieces*t.lasts(min(piece, spreadBlock)), spreadLimit)
}

// lasts returns how long the uplink takes for n bytes, 0 while its rate is not known. The caller holds t.mu.
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

// countBusy adds the time since the last measurement, in which something was on its way, to busy. The caller holds
// t.mu.
func (t *turns) countBusy(now time.Time) {
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
		if g.fetched { // it may be sent yet, and its bytes count then
			t.countBusy(now)
		}
		t.pending -= g.bytes
		return true
	})
}

// dropUnfetched takes n bytes off the leases that nobody fetches yet.
func (t *turns) dropUnfetched(n int64) {
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

// unused gives back n bytes that an agent took and did not lease.
func (t *turns) unused(agent string, n int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.shares[agent]; s != nil {
		s.leased, t.front = s.leased-n, nil
	}
	t.dropUnfetched(n)
	t.changed.Wake()
}

// beginSend notes that n leased bytes are being fetched. The caller calls done when they were sent, or never will be.
func (t *turns) beginSend(n int64) (done func()) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dropUnfetched(n)
	g := &grant{bytes: n, until: time.Now().Add(turnLimit + t.lasts(2*(t.pending+n))), fetched: true}
	t.add(g)
	return func() { t.endSend(g) }
}

func (t *turns) endSend(g *grant) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	t.sentBytes += g.bytes
	t.countBusy(now)
	if i := slices.Index(t.open, g); i >= 0 {
		t.open = slices.Delete(t.open, i, i+1)
		t.pending -= g.bytes
	}
	if t.busy >= rateStep || t.sentBytes >= max(rateBytes, rateWindows*t.window()) {
		if now.Sub(t.began) > rateTime {
			t.rate, t.last, t.began = 0, t.rate, now
		}
		t.rate = max(t.rate, float64(t.sentBytes)/max(t.busy, shortest).Seconds())
		t.busy, t.sentBytes = 0, 0
	}
	t.changed.Wake()
}
