package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
	"kraken/proto/ring"
)

// Origin is one origin of the cluster.
type Origin struct {
	ID   string
	URL  string
	Peer string // host:port of its peer listener
	*OriginClient
	health *passive
}

// Origins are all origins of a cluster, with passive health: one that could not be reached is asked last for a while.
// It implements registry.Blobs over them.
type Origins struct {
	ring *ring.Ring
	byID map[string]*Origin
	all  []*Origin
}

// deadFor is how long an origin that could not be reached is asked last.
const deadFor = 2 * time.Second

// passive remembers when a peer could not be reached.
type passive struct{ until atomic.Int64 }

func (p *passive) observe(reached bool) {
	switch {
	case !reached:
		p.until.Store(time.Now().Add(deadFor).UnixNano())
	case p.until.Load() != 0:
		p.until.Store(0)
	}
}

func (p *passive) dead() bool { return p.until.Load() > time.Now().UnixNano() }

// NewOrigins takes the configured members; all must have URLs.
func NewOrigins(members []ring.Member, replicas int, hc *http.Client) (*Origins, error) {
	o := &Origins{byID: map[string]*Origin{}}
	var ids []string
	for _, m := range members {
		health := &passive{}
		c, err := newOriginClient(m.URL, hc, health.observe)
		if err != nil {
			return nil, fmt.Errorf("origin %s: %w", m.ID, err)
		}
		or := &Origin{ID: m.ID, URL: c.Base(), Peer: m.Peer, OriginClient: c, health: health}
		if o.byID[m.ID] != nil {
			return nil, fmt.Errorf("origin %s is configured twice", m.ID)
		}
		o.byID[m.ID] = or
		o.all = append(o.all, or)
		ids = append(ids, m.ID)
	}
	if len(ids) == 0 {
		return nil, errNoOrigin
	}
	o.ring = ring.New(ids, replicas)
	return o, nil
}

// All are all origins in the order of the configuration.
func (o *Origins) All() []*Origin { return o.all }

// Get returns an origin by id, nil when it is not configured.
func (o *Origins) Get(id string) *Origin { return o.byID[id] }

// Ring says who owns what.
func (o *Origins) Ring() *ring.Ring { return o.ring }

func (o *Origins) pick(ids []string) []*Origin {
	out := make([]*Origin, 0, len(ids))
	var dead []*Origin
	for _, id := range ids {
		if or := o.byID[id]; or.health.dead() {
			dead = append(dead, or)
		} else {
			out = append(out, or)
		}
	}
	return append(out, dead...)
}

// For are all origins in rendezvous order for d, those that could not be reached lately last.
func (o *Origins) For(d digest.Digest) []*Origin { return o.pick(o.ring.Order(d)) }

// Owners are the owners of d, those that could not be reached lately last.
func (o *Origins) Owners(d digest.Digest) []*Origin { return o.pick(o.ring.Owners(d)) }

// walk asks origin after origin until one has the blob. An owner looks at the others and at the bucket by itself, so
// one owner's answer is everybody's: 404 when one could ask all, ErrUnavailable when none could.
func walk[T any](ctx context.Context, o *Origins, d digest.Digest, ask func(*Origin) (T, error)) (T, error) {
	var zero T
	var errs []error
	for _, or := range o.For(d) {
		v, err := ask(or)
		if err == nil {
			return v, nil
		}
		if ctx.Err() != nil || errors.Is(err, registry.ErrBlobUnknown) || errors.Is(err, registry.ErrDigestInvalid) || errors.Is(err, registry.ErrNameInvalid) {
			return zero, err
		}
		errs = append(errs, err)
	}
	return zero, &registry.RetryError{Err: fmt.Errorf("%w: blob %s: %w", registry.ErrUnavailable, d, errors.Join(errs...)), After: time.Second}
}

// StatBlob implements registry.Blobs.
func (o *Origins) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	return walk(ctx, o, d, func(or *Origin) (v1.Descriptor, error) { return or.StatBlob(ctx, repo, d) })
}

// OpenBlob implements registry.Blobs.
func (o *Origins) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	return walk(ctx, o, d, func(or *Origin) (*registry.Content, error) { return or.OpenBlob(ctx, repo, d, hint) })
}

var errNoOrigin = errors.New("no origin is configured")
