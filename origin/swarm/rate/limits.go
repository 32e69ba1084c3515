// Package rate holds the traffic of blobs to limits: of the process and of each blob, up and down, between peers and
// over HTTP. It knows neither peers nor bodies: who sends or receives waits here for its turn.
package rate

import (
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	"kraken/proto/config"
)

// MaxTurn is how many bytes one may take at once at most: the longest block that the BitTorrent library sends.
const MaxTurn = 256 << 10

// Limits bound the traffic of blobs, in bytes a second; 0 is unlimited. They count what goes between peers, and what
// Limiter.Upload and Limiter.Download wrap: the HTTP side of the same transfers.
type Limits struct {
	// UploadRate and DownloadRate are for the whole process.
	UploadRate   config.Rate `yaml:"upload_rate" json:"upload_rate"`
	DownloadRate config.Rate `yaml:"download_rate" json:"download_rate"`
	// BlobUploadRate and BlobDownloadRate are for each blob.
	BlobUploadRate   config.Rate `yaml:"blob_upload_rate" json:"blob_upload_rate"`
	BlobDownloadRate config.Rate `yaml:"blob_download_rate" json:"blob_download_rate"`
}

// Attr returns the limits for a log, in words.
func (r Limits) Attr() slog.Attr {
	return slog.Group("rates", "upload", r.UploadRate.String(), "download", r.DownloadRate.String(),
		"blob_upload", r.BlobUploadRate.String(), "blob_download", r.BlobDownloadRate.String())
}

// Min is the lowest limit, in bytes a second. A lower one would look like a peer, or an origin, that has died: those
// are given up after two seconds without progress.
const Min = 1_000_000 / 8

// Validate returns an error that names a limit which the swarm can't live with.
func (r *Limits) Validate() error {
	for _, v := range []struct {
		name string
		rate config.Rate
	}{
		{"upload_rate", r.UploadRate}, {"download_rate", r.DownloadRate},
		{"blob_upload_rate", r.BlobUploadRate}, {"blob_download_rate", r.BlobDownloadRate},
	} {
		if v.rate < 0 || v.rate > 0 && v.rate < Min {
			return fmt.Errorf("%s: %d bytes a second, want 0 (unlimited) or at least 1Mbit/s", v.name, v.rate)
		}
	}
	return nil
}

// Limiter makes traffic keep to Limits, which may change: whoever waits then begins to wait anew. It is safe for
// concurrent use.
type Limiter struct {
	now atomic.Pointer[regime]
	// up is the process's limit of uploads, which the library takes as well, when it sends a block: not before, because
	// what it has read for a peer is often not wanted any more when its turn comes (a crowd of 8 took 1.4 times as
	// long).
	up *rate.Limiter
	// turn is held by the one body that competes with the library for up.
	turn chan struct{}
	// setting is held while limits change.
	setting sync.Mutex
}

// regime is the time between two changes of the limits.
type regime struct {
	limits   Limits
	up, down *direction
	parts    *rate.Limiter // of blocks that the library sends; nil without a limit of uploads
	over     chan struct{} // closed when the next one begins
}

// upBurst is how much of blocks the library begins to send at once, or a second's worth, if that is less. It panics
// when a block is longer. As much is then sent side by side, in parts: less leaves each receiver's link to one sender
// at a time, more lets blocks take so long that they are asked of others.
const upBurst = 1 << 20

// NewLimiter returns a Limiter of valid limits.
func NewLimiter(r Limits) *Limiter {
	l := &Limiter{up: rate.NewLimiter(rate.Inf, upBurst), turn: make(chan struct{}, 1)}
	l.set(r)
	return l
}

// Limits returns the limits as they are now.
func (l *Limiter) Limits() Limits { return l.now.Load().limits }

// Library returns the limit of all uploads, for the BitTorrent library to take when it sends a block.
func (l *Limiter) Library() *rate.Limiter { return l.up }

// Change sets the limits to what edit makes of them, at once for all that is under way, too. Nothing changes when edit
// fails or what it leaves is not valid. Changes come one after the other.
func (l *Limiter) Change(edit func(*Limits) error) error {
	l.setting.Lock()
	defer l.setting.Unlock()
	r := l.Limits()
	if err := edit(&r); err != nil {
		return err
	}
	if err := r.Validate(); err != nil {
		return err
	}
	l.set(r)
	return nil
}

func (l *Limiter) set(r Limits) {
	next := &regime{
		limits: r, over: make(chan struct{}),
		up: newDirection(0, r.BlobUploadRate), down: newDirection(r.DownloadRate, r.BlobDownloadRate),
	}
	if r.UploadRate > 0 {
		next.parts = rate.NewLimiter(rate.Limit(r.UploadRate), 2*turnOf(r.UploadRate))
		l.up.SetBurst(int(min(max(r.UploadRate, MaxTurn), upBurst)))
		l.up.SetLimit(rate.Limit(r.UploadRate))
	} else {
		l.up.SetLimit(rate.Inf)
	}
	if last := l.now.Swap(next); last != nil {
		close(last.over)
	}
}

// direction limits what goes one way, but for the uploads of the whole process. Turns are taken in the order of asking.
type direction struct {
	rate  config.Rate // the lower of both, 0 for none
	all   *rate.Limiter
	blob  config.Rate
	mu    sync.Mutex
	blobs map[digest.Digest]*rate.Limiter
}

func newDirection(all, blob config.Rate) *direction {
	return &direction{rate: lower(all, blob), all: limiter(all), blob: blob, blobs: map[digest.Digest]*rate.Limiter{}}
}

// lower returns the lower of two limits, where 0 is none.
func lower(a, b config.Rate) config.Rate {
	if a == 0 || b > 0 && b < a {
		return b
	}
	return a
}

// limiter returns a limiter that allows bursts of a tenth of a second: longer ones would fill the queues of the link
// that the rate is meant to spare.
func limiter(r config.Rate) *rate.Limiter {
	if r == 0 {
		return rate.NewLimiter(rate.Inf, 0)
	}
	return rate.NewLimiter(rate.Limit(r), int(min(max(r/10, MaxTurn), 1<<20)))
}

// turnOf returns how many bytes one may take at once, so that many get their turn in a second.
func turnOf(r config.Rate) int {
	if r == 0 {
		return MaxTurn
	}
	return int(min(max(r/200, 16<<10), MaxTurn))
}

// ofBlob returns the limiter of one blob, and forgets those of others that have nothing to remember.
func (d *direction) ofBlob(key digest.Digest) *rate.Limiter {
	d.mu.Lock()
	defer d.mu.Unlock()
	if l := d.blobs[key]; l != nil {
		return l
	}
	if len(d.blobs) >= 256 {
		for k, l := range d.blobs {
			if l.Tokens() >= float64(l.Burst()) { // a new one would be the same
				delete(d.blobs, k)
			}
		}
	}
	l := limiter(d.blob)
	d.blobs[key] = l
	return l
}

// reserve takes a turn of n bytes, at most MaxTurn, and returns in how long it comes and how to give it back.
func (d *direction) reserve(key digest.Digest, n int) (delay time.Duration, cancel func()) {
	now := time.Now()
	r := d.all.ReserveN(now, n)
	if d.blob == 0 || key == "" {
		return r.DelayFrom(now), r.Cancel
	}
	b := d.ofBlob(key).ReserveN(now, n)
	return max(r.DelayFrom(now), b.DelayFrom(now)), func() { r.Cancel(); b.Cancel() }
}

// TurnDown returns how many bytes of what comes to read at once.
func (l *Limiter) TurnDown() int { return turnOf(l.now.Load().down.rate) }

// WaitDown blocks until n bytes of a blob may have come; an empty key counts for no blob. It returns false when gone
// was closed first.
func (l *Limiter) WaitDown(gone <-chan struct{}, key digest.Digest, n int) bool {
	return l.wait(gone, key, n, func(g *regime) *direction { return g.down })
}

// WaitBlobUp blocks until n bytes of a blob may be sent by the limit of the blob alone, for what the library sends,
// which keeps to the limit of all by itself. It returns false when gone was closed first.
func (l *Limiter) WaitBlobUp(gone <-chan struct{}, key digest.Digest, n int) bool {
	return l.wait(gone, key, n, func(g *regime) *direction { return g.up })
}

// WaitUp blocks until n bytes of a blob may go over HTTP, by the limits of all and of the blob. It returns false when
// gone was closed first.
func (l *Limiter) WaitUp(gone <-chan struct{}, key digest.Digest, n int) bool {
	if !l.WaitBlobUp(gone, key, n) {
		return false
	}
	if l.up.Limit() == rate.Inf {
		return true
	}
	select {
	case l.turn <- struct{}{}:
		defer func() { <-l.turn }()
	case <-gone:
		return false
	}
	for n > 0 {
		g := l.now.Load()
		k := min(n, MaxTurn)
		// The library only looks whether there is room now: a reservation in the future would keep it out for ever, and
		// one that is cancelled gives nothing back when the library reserved after it. So look, too.
		if l.up.AllowN(time.Now(), k) {
			n -= k
			continue
		}
		missing := float64(k) - l.up.Tokens()
		if !g.sleep(gone, max(time.Duration(missing/float64(l.up.Limit())*float64(time.Second)), time.Millisecond)) {
			return false
		}
	}
	return true
}

// wait takes turns of one direction until it has n bytes. It returns false when gone was closed first.
func (l *Limiter) wait(gone <-chan struct{}, key digest.Digest, n int, of func(*regime) *direction) bool {
	for n > 0 {
		g := l.now.Load()
		d := of(g)
		if d.rate == 0 {
			return true
		}
		k := min(n, MaxTurn)
		delay, cancel := d.reserve(key, k)
		if delay > 0 {
			if !g.sleep(gone, delay) {
				cancel()
				return false
			}
			select {
			case <-g.over:
				continue
			default:
			}
		}
		n -= k
	}
	return true
}

// WaitPart blocks until a part of a block that the library has begun to send may go, and returns how much of the n
// bytes that are left it is; false when gone was closed first. The library hands over whole blocks, up to upBurst at
// once; on a slow link the queue of the node's own interface would drop much of that.
func (l *Limiter) WaitPart(gone <-chan struct{}, n int) (int, bool) {
	for {
		g := l.now.Load()
		if g.parts == nil {
			return n, true
		}
		k := min(n, turnOf(g.limits.UploadRate))
		r := g.parts.ReserveN(time.Now(), k)
		if delay := r.Delay(); delay > 0 {
			if !g.sleep(gone, delay) {
				r.Cancel()
				return 0, false
			}
			select {
			case <-g.over:
				continue
			default:
			}
		}
		return k, true
	}
}

// sleep blocks for d or until the regime is over. It returns false when gone was closed first.
func (g *regime) sleep(gone <-chan struct{}, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-g.over:
	case <-gone:
		return false
	}
	return true
}
