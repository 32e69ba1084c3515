package swarm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	"kraken/proto/config"
)

// Rates bound the traffic of blobs, in bytes a second; 0 is unlimited. They count what goes between peers, and what
// LimitUpload and LimitDownload wrap: the HTTP side of the same transfers.
type Rates struct {
	// UploadRate and DownloadRate are for the whole process.
	UploadRate   config.Rate `yaml:"upload_rate" json:"upload_rate"`
	DownloadRate config.Rate `yaml:"download_rate" json:"download_rate"`
	// BlobUploadRate and BlobDownloadRate are for each blob.
	BlobUploadRate   config.Rate `yaml:"blob_upload_rate" json:"blob_upload_rate"`
	BlobDownloadRate config.Rate `yaml:"blob_download_rate" json:"blob_download_rate"`
}

// attr is the rates in a log, in words.
func (r Rates) attr() slog.Attr {
	return slog.Group("rates", "upload", r.UploadRate.String(), "download", r.DownloadRate.String(),
		"blob_upload", r.BlobUploadRate.String(), "blob_download", r.BlobDownloadRate.String())
}

// minRate keeps a limit from looking like a peer, or an origin, that has died: those are given up after two seconds
// without progress.
const minRate = 1_000_000 / 8

// Validate refuses rates that the swarm can't live with.
func (r *Rates) Validate() error {
	for _, v := range []struct {
		name string
		rate config.Rate
	}{
		{"upload_rate", r.UploadRate}, {"download_rate", r.DownloadRate},
		{"blob_upload_rate", r.BlobUploadRate}, {"blob_download_rate", r.BlobDownloadRate},
	} {
		if v.rate < 0 || v.rate > 0 && v.rate < minRate {
			return fmt.Errorf("%s: %d bytes a second, want 0 (unlimited) or at least 1Mbit/s", v.name, v.rate)
		}
	}
	return nil
}

// limits are the rates as they are now. Whoever waits when they change begins to wait anew.
type limits struct {
	now atomic.Pointer[regime]
	// up is the process's limit of uploads, which the library takes as well, when it sends a block: not before, because
	// what it has read for a peer is often not wanted any more when its turn comes (a crowd of 8 took 1.4 times as
	// long).
	up *rate.Limiter
	// turn is held by the one body that competes with the library for up.
	turn chan struct{}
}

// regime is the time between two changes.
type regime struct {
	rates    Rates
	up, down *direction
	parts    *rate.Limiter // of blocks that the library sends; nil without a limit of uploads
	over     chan struct{} // closed when the next one begins
}

// upBurst is how much of blocks the library begins to send at once, or a second's worth, if that is less. It panics
// when a block is longer. As much is then sent side by side, in parts: less leaves each receiver's link to one sender
// at a time, more lets blocks take so long that they are asked of others.
const upBurst = 1 << 20

func (l *limits) init(r Rates) {
	l.up, l.turn = rate.NewLimiter(rate.Inf, upBurst), make(chan struct{}, 1)
	l.set(r)
}

func (l *limits) set(r Rates) {
	next := &regime{
		rates: r, over: make(chan struct{}),
		up: newDirection(0, r.BlobUploadRate), down: newDirection(r.DownloadRate, r.BlobDownloadRate),
	}
	if r.UploadRate > 0 {
		next.parts = rate.NewLimiter(rate.Limit(r.UploadRate), 2*turnOf(r.UploadRate))
		l.up.SetBurst(int(min(max(r.UploadRate, maxBlock), upBurst)))
		l.up.SetLimit(rate.Limit(r.UploadRate))
	} else {
		l.up.SetLimit(rate.Inf)
	}
	if last := l.now.Swap(next); last != nil {
		close(last.over)
	}
}

// SetRates changes the limits, at once for all that is under way, too.
func (s *Swarm) SetRates(r Rates) error {
	if err := r.Validate(); err != nil {
		return err
	}
	s.ratesMu.Lock()
	defer s.ratesMu.Unlock()
	s.limits.set(r)
	return nil
}

// Rates are the limits as they are now.
func (s *Swarm) Rates() Rates { return s.limits.now.Load().rates }

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

// lower is the lower of two limits, where 0 is none.
func lower(a, b config.Rate) config.Rate {
	if a == 0 || b > 0 && b < a {
		return b
	}
	return a
}

// limiter allows bursts of a tenth of a second: longer ones would fill the queues of the link that the rate is meant to
// spare.
func limiter(r config.Rate) *rate.Limiter {
	if r == 0 {
		return rate.NewLimiter(rate.Inf, 0)
	}
	return rate.NewLimiter(rate.Limit(r), int(min(max(r/10, maxBlock), 1<<20)))
}

// turnOf is how much one may take at once, so that many get their turn in a second.
func turnOf(r config.Rate) int {
	if r == 0 {
		return maxBlock
	}
	return int(min(max(r/200, 16<<10), maxBlock))
}

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

// reserve takes a turn of at most maxBlock bytes and says when it comes.
func (d *direction) reserve(key digest.Digest, n int) (delay time.Duration, cancel func()) {
	now := time.Now()
	r := d.all.ReserveN(now, n)
	if d.blob == 0 || key == "" {
		return r.DelayFrom(now), r.Cancel
	}
	b := d.ofBlob(key).ReserveN(now, n)
	return max(r.DelayFrom(now), b.DelayFrom(now)), func() { r.Cancel(); b.Cancel() }
}

// download blocks until n bytes of a blob may have come. False: gone was closed first.
func (l *limits) download(gone <-chan struct{}, key digest.Digest, n int) bool {
	return l.wait(gone, key, n, func(g *regime) *direction { return g.down })
}

// uploadOf is the limit of the blob alone, for what the library sends.
func (l *limits) uploadOf(gone <-chan struct{}, key digest.Digest, n int) bool {
	return l.wait(gone, key, n, func(g *regime) *direction { return g.up })
}

// upload blocks until n bytes of a blob may go over HTTP.
func (l *limits) upload(gone <-chan struct{}, key digest.Digest, n int) bool {
	if !l.uploadOf(gone, key, n) {
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
		k := min(n, maxBlock)
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

// wait takes turns of one direction.
func (l *limits) wait(gone <-chan struct{}, key digest.Digest, n int, of func(*regime) *direction) bool {
	for n > 0 {
		g := l.now.Load()
		d := of(g)
		if d.rate == 0 {
			return true
		}
		k := min(n, maxBlock)
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

// part waits until a part of a block that the library has begun to send may go, and returns how much of the n bytes
// that are left it is. The library hands over whole blocks, up to upBurst at once; on a slow link the queue of the
// node's own interface would drop much of that. False: gone was closed first.
func (l *limits) part(gone <-chan struct{}, n int) (int, bool) {
	for {
		g := l.now.Load()
		if g.parts == nil {
			return n, true
		}
		k := min(n, turnOf(g.rates.UploadRate))
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

// sleep also ends when the regime does. False: gone was closed.
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

// LimitUpload keeps what is read of a blob's body to the upload rates, to be sent over HTTP. While there are none the
// body itself comes back, so that a file still goes by sendfile: a limit that is set later concerns the next request.
func (s *Swarm) LimitUpload(ctx context.Context, d digest.Digest, body io.ReadSeeker) io.ReadSeeker {
	if r := s.Rates(); r.UploadRate == 0 && r.BlobUploadRate == 0 {
		return body
	}
	return &limited{s: s, ctx: ctx, digest: d, upload: true, r: body, Seeker: body}
}

// LimitDownload keeps what is read of a blob that comes over HTTP to the download rates.
func (s *Swarm) LimitDownload(ctx context.Context, d digest.Digest, r io.Reader) io.Reader {
	return &limited{s: s, ctx: ctx, digest: d, r: r}
}

type limited struct {
	io.Seeker
	s      *Swarm
	ctx    context.Context
	digest digest.Digest
	upload bool
	r      io.Reader
}

func (l *limited) Read(b []byte) (int, error) {
	rates := l.s.Rates()
	turn, wait := turnOf(lower(rates.DownloadRate, rates.BlobDownloadRate)), l.s.limits.download
	if l.upload {
		turn, wait = turnOf(lower(rates.UploadRate, rates.BlobUploadRate)), l.s.limits.upload
	}
	n, err := l.r.Read(b[:min(len(b), turn)])
	if n > 0 && !wait(l.ctx.Done(), l.digest, n) {
		return n, errors.Join(err, context.Cause(l.ctx))
	}
	return n, err
}
