package login

import (
	"crypto/rand"
	"crypto/sha256"
	"sync"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
)

// throttle slows guesses. Each password that is compared takes one from the buckets of the address, of the user, and of
// both, before, and gives them back when it was right; while one of these is empty nothing is compared. Pairs that were
// verified lately don't come here, so that nobody who works is locked out by who guesses; and nor does what nobody can
// guess, robots' keys and ID tokens. It is safe for concurrent use.
type throttle struct {
	salt [16]byte

	mu      sync.Mutex
	buckets *lru.Cache[bucketKey, *bucket]
}

// bucketKey is the hash of what a bucket is of: its size is not the client's choice.
type bucketKey [sha256.Size]byte

// limit is how many are let pass at once, and how long until one more is.
type limit struct {
	burst float64
	every time.Duration
}

var (
	limitSource = limit{30, 2 * time.Second}
	limitUser   = limit{50, 2 * time.Second}
	limitBoth   = limit{5, 10 * time.Second}
	// limitTold is of failures with what can't be guessed, of an address: beyond it they are told nobody.
	limitTold = limit{30, 2 * time.Second}
)

type bucket struct {
	limit
	key  bucketKey
	left float64
	at   time.Time
}

// maxBuckets bounds the memory. Beyond it the one is forgotten that was asked for least lately. An address has two made
// for each guess that it is let have, so to have one forgotten before it is full again takes thousands of addresses.
const maxBuckets = 100_000

func newThrottle(buckets int) *throttle {
	t := &throttle{}
	rand.Read(t.salt[:])                                        // never fails
	t.buckets, _ = lru.New[bucketKey, *bucket](max(1, buckets)) // fails for 0 alone
	return t
}

// of returns a bucket, a full one where none is kept. The caller holds mu.
func (t *throttle) of(what, name string, l limit, now time.Time) *bucket {
	h := sha256.New()
	h.Write(t.salt[:])
	h.Write([]byte(what + "\x00" + name))
	k := bucketKey(h.Sum(nil))
	b, ok := t.buckets.Get(k)
	if !ok {
		b = &bucket{limit: l, key: k, left: l.burst, at: now}
	}
	b.left = min(b.burst, b.left+float64(now.Sub(b.at))/float64(b.every))
	b.at = now
	return b
}

// takeFrom takes one out of a bucket, which is kept from then on. The caller holds mu.
func (t *throttle) takeFrom(b *bucket) {
	b.left--
	t.buckets.Add(b.key, b)
}

// putBack puts one back where the bucket is still kept, and forgets one that is full. The caller holds mu.
func (t *throttle) putBack(k bucketKey) {
	b, ok := t.buckets.Peek(k)
	if !ok {
		return
	}
	if b.left = min(b.burst, b.left+1); b.left == b.burst {
		t.buckets.Remove(k)
	}
}

// wait returns how long until one can be taken, 0 for now.
func (b *bucket) wait() time.Duration {
	if b.left >= 1 {
		return 0
	}
	return max(1, time.Duration((1-b.left)*float64(b.every)))
}

// take is called before a password is compared. It returns how long until that may be: 0 where it may be at once,
// and then what gives back what was taken.
func (t *throttle) take(source, user string) (back func(), wait time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	all := []*bucket{t.of("source", source, limitSource, now), t.of("user", user, limitUser, now), t.of("both", source+"\x00"+user, limitBoth, now)}
	for _, b := range all {
		wait = max(wait, b.wait())
	}
	if wait > 0 {
		return nil, wait
	}
	for _, b := range all {
		t.takeFrom(b)
	}
	return func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		for _, b := range all {
			t.putBack(b.key)
		}
	}, 0
}

// tell counts a failure with what can't be guessed. It returns how long until the next one of the address is told of, 0
// when this one is.
func (t *throttle) tell(source string) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	b := t.of("told", source, limitTold, time.Now())
	wait := b.wait()
	if wait == 0 {
		t.takeFrom(b)
	}
	return wait
}
