package proxy

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// A proxy hashes nothing of what it passes on. It doubts a blob whose size is not the membership's, and one that a
// client asks for again right after it has read all of it, and tells the origins: who holds a wrong copy drops it.

const (
	// rereadWithin is how soon a client asks again for a blob that it found to be wrong.
	rereadWithin = 30 * time.Second
	maxRereads   = 10_000
	// sizeDoubted is for how long a size that is not the membership's is not believed. An origin that was told has
	// verified its copy by then, so what still has that size has the digest, and the membership is wrong.
	sizeDoubted = 20 * time.Second
	tellTimeout = 10 * time.Second
)

// doubts is what a proxy knows of blobs that may be wrong.
type doubts struct {
	rereads *cluster.Rereads

	mu    sync.Mutex
	sizes map[digest.Digest]time.Time // since when another size than the membership's is doubted
}

func newDoubts() *doubts {
	return &doubts{rereads: cluster.NewRereads(rereadWithin, maxRereads), sizes: map[digest.Digest]time.Time{}}
}

// believed reports whether the size of a blob that is not the membership's has been doubted for long enough.
func (x *doubts) believed(d digest.Digest) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	now := time.Now()
	since, known := x.sizes[d]
	if !known || now.Sub(since) > time.Hour {
		if len(x.sizes) >= maxRereads {
			clear(x.sizes)
		}
		x.sizes[d] = now
		return false
	}
	return now.Sub(since) > sizeDoubted
}

type sourceKey struct{}

// withSource lets a read know whose it is.
func withSource(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet && r.Header.Get("Range") == "" {
			r = r.WithContext(context.WithValue(r.Context(), sourceKey{}, transport.SourceOf(r.RemoteAddr)))
		}
		next.ServeHTTP(w, r)
	})
}

// watch makes the end of a reading of all of c known, and doubts the blob when the same client has just read all of it.
func (p *Proxy) watch(ctx context.Context, repo string, c *registry.Content) *registry.Content {
	source, ok := ctx.Value(sourceKey{}).(string)
	if !ok {
		return c
	}
	key := source + " " + c.Digest.String()
	if p.doubts.rereads.Again(key) {
		p.Background(func(ctx context.Context) { p.tell(ctx, repo, c.Digest, p.origins.All()...) })
	}
	closed := c.Close
	c.Close = func() error {
		if at, err := c.Reader().Seek(0, io.SeekCurrent); err == nil && at == c.Size {
			p.doubts.rereads.Read(key)
		}
		return closed()
	}
	return c
}

// tell makes origins verify their copies of a blob.
func (p *Proxy) tell(ctx context.Context, repo string, d digest.Digest, origins ...*cluster.Origin) {
	p.m.doubted.Inc()
	for _, o := range origins {
		ctx, cancel := context.WithTimeout(ctx, tellTimeout)
		if err := o.Verify(ctx, repo, d); err != nil {
			p.log.Debug("an origin was not made to verify a blob", "origin", o.ID, "digest", d, "error", err)
		}
		cancel()
	}
}

// openElsewhere opens a blob of which an origin has said another size than the membership does, at an origin that has
// it with that size. Those that say otherwise are made to verify their copies.
func (p *Proxy) openElsewhere(ctx context.Context, repo string, d digest.Digest, hint registry.Range, size int64) (*registry.Content, error) {
	believed := p.doubts.believed(d)
	for _, o := range p.origins.For(d) {
		c, err := o.OpenBlob(ctx, repo, d, hint)
		if err != nil {
			continue
		}
		if c.Size == size || believed {
			return c, nil
		}
		p.log.Warn("an origin has a blob with another size than its membership", "origin", o.ID, "digest", d, "size", c.Size, "membership", size)
		c.Close()
		p.Background(func(ctx context.Context) { p.tell(ctx, repo, d, o) })
	}
	return nil, &registry.RetryError{Err: fmt.Errorf("%w: no origin has blob %s with its %d bytes", registry.ErrUnavailable, d, size), After: 2 * time.Second}
}
