package origin

import (
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
)

// tries is what is known of the debts that were tried to be paid and are left: when each is tried again, and why it is
// left. What is told of write-back is what these say, so nothing is told of a debt that is paid.
type tries struct {
	mu   sync.Mutex
	left map[digest.Digest]try
}

// try is the last try of a debt.
type try struct {
	at    time.Time // of the next one
	delay time.Duration
	alone bool // fewer origins than replicas were found to owe it
	// err is why it failed, nil where it only waits. That a bucket is down is errBucketDown and no more: so many may
	// fail of it.
	err    error
	failed time.Time
}

// due reports whether a debt may be tried.
func (t *tries) due(d digest.Digest) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return time.Now().After(t.left[d].at)
}

// forget forgets a debt, so that it is tried at once if there is one again.
func (t *tries) forget(d digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.left, d)
}

// keep forgets all but what is marked, which is sorted: a debt may end otherwise than by a try.
func (t *tries) keep(marked []digest.Digest) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for d := range t.left {
		if _, is := slices.BinarySearch(marked, d); !is {
			delete(t.left, d)
		}
	}
}

// note takes down a try that has left the debt, and returns after how long the next one is: the longer, the more there
// were, and no longer than wait, if that is not 0.
func (t *tries) note(d digest.Digest, wait time.Duration, alone bool, err error) time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	if errors.Is(err, errBucketDown) {
		err = errBucketDown
	}
	now := time.Now()
	x := try{delay: min(max(2*t.left[d].delay, time.Second), maxBackoff), alone: alone, err: err, failed: now}
	if wait > 0 {
		x.delay = min(x.delay, wait)
	}
	x.at = now.Add(x.delay)
	if t.left == nil {
		t.left = map[digest.Digest]try{}
	}
	t.left[d] = x
	return x.delay
}

// allDue has all be tried now.
func (t *tries) allDue() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for d, x := range t.left {
		x.at, x.delay = time.Time{}, 0
		t.left[d] = x
	}
}

// state is how many of the debts that are left fewer origins than there are replicas were found to have, and the latest
// error of those that failed.
func (t *tries) state() (alone int, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var last time.Time
	for _, x := range t.left {
		if x.alone {
			alone++
		}
		if x.err != nil && (err == nil || x.failed.After(last)) {
			last, err = x.failed, x.err
		}
	}
	return alone, err
}
