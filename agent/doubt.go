package agent

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// An agent doubts a blob of an origin whose bytes or size turned out to be others, and tells the origin. It doubts one
// of its own when a runtime asks for it again right after it has read all of it: runtimes check digests, and say
// nothing.

const (
	rereadWithin = 30 * time.Second
	maxRereads   = 10_000
	// doubtEvery is how long a blob of the cache is left alone after it was verified because of a doubt.
	doubtEvery  = time.Minute
	maxDoubted  = 10_000
	tellTimeout = 10 * time.Second
)

// doubts is what an agent knows of blobs that may be wrong.
type doubts struct {
	rereads *cluster.Rereads

	mu       sync.Mutex
	verified map[digest.Digest]time.Time // when a blob of the cache was verified last because of a doubt
	busy     bool                        // one is being read: doubts cost a blob's worth of disk
}

func newDoubts() *doubts {
	return &doubts{rereads: cluster.NewRereads(rereadWithin, maxRereads), verified: map[digest.Digest]time.Time{}}
}

// begin reports whether a doubted blob is to be verified now. If it is, the caller calls end.
func (x *doubts) begin(d digest.Digest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.busy || time.Since(x.verified[d]) < doubtEvery {
		return false
	}
	if len(x.verified) >= maxDoubted {
		clear(x.verified)
	}
	x.busy, x.verified[d] = true, time.Now()
	return true
}

func (x *doubts) end() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.busy = false
}

// watch makes the end of a reading of all of c known, and verifies the blob of the cache when somebody has just read
// all of it. hint is what the request asks for.
func (a *Agent) watch(c *registry.Content, hint registry.Range) *registry.Content {
	if hint != registry.Whole {
		return c
	}
	d := c.Digest
	if a.doubts.rereads.Again(d.String()) && a.doubts.begin(d) {
		began := a.Background(func(ctx context.Context) {
			defer a.doubts.end()
			switch err := a.store.Scrub(ctx, d); {
			case errors.Is(err, store.ErrDigestMismatch): // the next reader fetches it
			case err != nil && ctx.Err() == nil && !errors.Is(err, store.ErrNotFound):
				a.log.Warn("a blob that was asked for twice was not verified", "digest", d, "error", err)
			}
		})
		if !began {
			a.doubts.end()
		}
	}
	closed := c.Close
	c.Close = func() error {
		if at, err := c.Reader().Seek(0, io.SeekCurrent); err == nil && at == c.Size {
			a.doubts.rereads.Read(d.String())
		}
		return closed()
	}
	return c
}

// tell makes origins verify their copies of a blob of which one at least has sent other bytes, or another size.
func (a *Agent) tell(repo string, d digest.Digest, ids ...string) {
	if len(ids) == 0 {
		return
	}
	a.m.doubted.Inc()
	a.Background(func(ctx context.Context) {
		for _, id := range ids {
			ctx, cancel := context.WithTimeout(ctx, tellTimeout)
			if err := a.origins.Get(id).Verify(ctx, repo, d); err != nil {
				a.log.Info("an origin was not made to verify a blob", "origin", id, "digest", d, "error", err)
			}
			cancel()
		}
	})
}
