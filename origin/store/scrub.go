package store

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"slices"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"github.com/opencontainers/go-digest"
	"golang.org/x/time/rate"

	"kraken/proto/config"
)

// ScrubConfig configures the reading and verifying of all blobs again, in the background.
type ScrubConfig struct {
	// Off reads nothing unless an operator asks for a pass.
	Off bool `yaml:"off"`
	// Rate bounds the reading, bytes a second, default 10MiB/s; a blob counts as 64 KiB at least.
	Rate config.Rate `yaml:"rate"`
	// Every is the time from the begin of one pass to the begin of the next, default 168h.
	Every config.Duration `yaml:"every"`
}

// Validate fills in defaults.
func (c *ScrubConfig) Validate() error {
	if c.Rate == 0 {
		c.Rate = 10 << 20
	}
	if c.Every == 0 {
		c.Every = config.Duration(7 * 24 * time.Hour)
	}
	if c.Rate < 0 || c.Every < 0 {
		return errors.New("scrub: rate and every must not be negative")
	}
	return nil
}

// scrubState is what the metrics show, and how a pass is asked for.
type scrubState struct {
	now                          chan struct{}
	bytes, blobs, rotten, passes atomic.Int64
	last                         atomic.Int64 // end of the last pass, Unix seconds
}

// Scrubbed returns how many blobs were verified again since the start, and how many of them had rotted.
func (s *Store) Scrubbed() (blobs, rotten int64) {
	return s.scrub.blobs.Load(), s.scrub.rotten.Load()
}

const (
	scrubChunk = 1 << 20
	scrubAlign = 4096
	// scrubLeast is what a smaller blob counts as at the rate. It bounds how many are opened, to 160 a second at the
	// default.
	scrubLeast = 64 << 10
	// scrubDelay keeps the first pass away from a start, when all else begins as well.
	scrubDelay = time.Minute
)

// ScrubNow asks RunScrub for a pass now; one that is under way is that pass.
func (s *Store) ScrubNow() {
	select {
	case s.scrub.now <- struct{}{}:
	default:
	}
}

// RunScrub verifies all blobs, pass after pass, until ctx is done.
func (s *Store) RunScrub(ctx context.Context) error {
	cfg := s.cfg.Scrub
	limit := rate.NewLimiter(rate.Limit(cfg.Rate), scrubChunk)
	wait := scrubDelay
	for {
		t := time.NewTimer(wait)
		due := t.C
		if cfg.Off {
			due = nil
		}
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-due:
		case <-s.scrub.now:
			t.Stop()
		}
		began := time.Now()
		if err := s.scrubAll(ctx, limit); err != nil {
			return nil // ctx is done
		}
		wait = max(time.Duration(cfg.Every)-time.Since(began), 0)
	}
}

// scrubAll is one pass. It begins anywhere: a process that is restarted often should come to all blobs all the same.
func (s *Store) scrubAll(ctx context.Context, limit *rate.Limiter) error {
	s.mu.Lock()
	all := make([]Info, 0, len(s.entries))
	for d, e := range s.entries {
		all = append(all, Info{d, e.size})
	}
	s.mu.Unlock()
	slices.SortFunc(all, func(a, b Info) int { return cmp.Compare(a.Digest, b.Digest) })
	if len(all) > 0 {
		at := rand.IntN(len(all))
		all = append(all[at:], all[:at]...)
	}
	began, rotten := time.Now(), 0
	buf := aligned(scrubChunk)
	for _, i := range all {
		err := s.scrubBlob(ctx, i.Digest, limit, buf)
		if ctx.Err() == nil && i.Size < scrubLeast {
			err = errors.Join(err, limit.WaitN(ctx, int(scrubLeast-i.Size)))
		}
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, ErrDigestMismatch):
			rotten++
		case err != nil && !errors.Is(err, ErrNotFound):
			s.log.Warn("a blob was not verified", "digest", i.Digest, "error", err)
		}
	}
	s.scrub.passes.Add(1)
	s.scrub.last.Store(time.Now().Unix())
	s.log.Info("verified all blobs", "blobs", len(all), "rotten", rotten, "took", time.Since(began).Round(time.Millisecond))
	return nil
}

// Scrub verifies a whole blob again. One that has rotted is removed, and what it owes to the bucket stays owed:
// ErrDigestMismatch. It is not an access, and does not keep the blob from being evicted.
func (s *Store) Scrub(ctx context.Context, d digest.Digest) error {
	return s.scrubBlob(ctx, d, rate.NewLimiter(rate.Inf, 0), aligned(scrubChunk))
}

func (s *Store) scrubBlob(ctx context.Context, d digest.Digest, limit *rate.Limiter, buf []byte) error {
	if err := s.find(d); err != nil {
		return fmt.Errorf("scrub: %w", err)
	}
	s.mu.Lock()
	e := s.entries[d]
	owed := e != nil && e.marked
	s.mu.Unlock()
	if e == nil {
		return fmt.Errorf("scrub: %w: %s", ErrNotFound, d)
	}
	good, err := s.intact(ctx, d, e, limit, buf)
	if err == nil && !good && owed { // it may be the last copy: one bad reading is not enough
		good, err = s.intact(ctx, d, e, limit, buf)
	}
	if err != nil {
		return fmt.Errorf("scrub %s: %w", d, err)
	}
	s.scrub.blobs.Add(1)
	if good {
		return nil
	}
	removed, err := s.removeRotten(d, e)
	if !removed && err == nil {
		return nil
	}
	return errors.Join(fmt.Errorf("scrub %s: %w", d, ErrDigestMismatch), err)
}

// removeRotten removes a blob whose bytes are wrong, and keeps what it owes as a debt without bytes. It returns false
// without an error when e is not the blob's entry any more: it was evicted, and perhaps fetched again, meanwhile.
func (s *Store) removeRotten(d digest.Digest, e *entry) (removed bool, err error) {
	err = s.removeWhole(d, func(now *entry) error {
		if now != e {
			return ErrNotFound
		}
		return nil
	})
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	s.scrub.rotten.Add(1)
	if errors.Is(err, errKept) { // the next who verifies it tries again
		s.log.Error("a blob is rotten and is not removed yet", "digest", d, "error", err)
		return false, err
	}
	s.log.Error("a blob was rotten and is removed", "digest", d, "size", e.size, "error", err)
	s.evicted([]digest.Digest{d})
	if s.cfg.OnRotten != nil {
		s.cfg.OnRotten(d)
	}
	return true, err
}

// intact reads a blob around the page cache where the file system can: what is to be verified is the disk, and what
// others read should stay cached. A disk that can't give the bytes back counts as rot.
func (s *Store) intact(ctx context.Context, d digest.Digest, e *entry, limit *rate.Limiter, buf []byte) (bool, error) {
	f, err := s.root.OpenFile(blobFile(d, fileData), os.O_RDONLY|syscall.O_DIRECT, 0)
	if errors.Is(err, syscall.EINVAL) {
		f, err = s.root.Open(blobFile(d, fileData))
	}
	if errors.Is(err, os.ErrNotExist) {
		if s.lose(d, e, err) {
			s.evicted([]digest.Digest{d})
		}
		return false, fmt.Errorf("%w: %s", ErrNotFound, d)
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	// No more than the blob needs, and a byte: the kernel clears what a direct read leaves of the buffer.
	buf = buf[:min(int64(len(buf)), (e.size+scrubAlign)/scrubAlign*scrubAlign)]
	v := d.Verifier()
	var read int64
	for {
		n, err := f.Read(buf)
		v.Write(buf[:n])
		read += int64(n)
		s.scrub.bytes.Add(int64(n))
		switch {
		case err == io.EOF:
			return read == e.size && v.Verified(), nil
		case errors.Is(err, syscall.EIO):
			return false, nil
		case err != nil:
			return false, err
		}
		if err := limit.WaitN(ctx, n); err != nil {
			return false, err
		}
	}
}

// aligned allocates memory as direct reads need it (open(2), O_DIRECT).
func aligned(n int) []byte {
	b := make([]byte, n+scrubAlign)
	off := -int(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) & (scrubAlign - 1)
	return b[off : off+n]
}
