package login

import (
	"sync"
	"time"
)

// throttle slows logins that fail: each failure takes one from the buckets of the address, of the user, and of both;
// while one of these is empty further logins are refused unseen. Pairs that were verified lately don't come here, so
// that nobody who works is locked out by who guesses.
type throttle struct {
	mu      sync.Mutex
	buckets map[string]*bucket
}

// limit is how many failures are let pass at once, and how long until one more is.
type limit struct {
	burst float64
	every time.Duration
}

var (
	limitSource = limit{30, 2 * time.Second}
	limitUser   = limit{50, 2 * time.Second}
	limitBoth   = limit{5, 10 * time.Second}
)

type bucket struct {
	limit
	left float64
	at   time.Time
}

// maxBuckets bounds the memory. Beyond it full buckets are forgotten, or else all.
const maxBuckets = 100_000

func newThrottle() *throttle { return &throttle{buckets: map[string]*bucket{}} }

func keysOf(source, user string) map[string]limit {
	return map[string]limit{"s" + source: limitSource, "u" + user: limitUser, "b" + source + "\x00" + user: limitBoth}
}

func (b *bucket) refill(now time.Time) {
	b.left = min(b.burst, b.left+float64(now.Sub(b.at))/float64(b.every))
	b.at = now
}

// wait returns how long until another try is looked at, 0 for now.
func (t *throttle) wait(source, user string) (d time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	for k := range keysOf(source, user) {
		if b := t.buckets[k]; b != nil {
			b.refill(now)
			if b.left < 1 {
				d = max(d, time.Duration((1-b.left)*float64(b.every)))
			}
		}
	}
	return d
}

// failed notes a failure.
func (t *throttle) failed(source, user string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	if len(t.buckets) >= maxBuckets {
		for k, b := range t.buckets {
			if b.refill(now); b.left >= b.burst {
				delete(t.buckets, k)
			}
		}
		if len(t.buckets) >= maxBuckets {
			clear(t.buckets)
		}
	}
	for k, l := range keysOf(source, user) {
		b := t.buckets[k]
		if b == nil {
			b = &bucket{limit: l, left: l.burst, at: now}
			t.buckets[k] = b
		}
		b.refill(now)
		b.left = max(0, b.left-1)
	}
}
