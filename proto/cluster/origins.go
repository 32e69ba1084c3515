package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/registry"
	"kraken/proto/ring"
	"kraken/proto/transport"
)

// Origin is one origin of the cluster, with a client of it.
type Origin struct {
	ring.Member
	*OriginClient
	health *health
}

// Answers reports whether there is no reason to ask others before this origin: it could be reached, and was not silent.
func (or *Origin) Answers() bool { return or.health.answers() }

// Origins are all origins of a cluster, with their health: one that could not be reached is asked last for a while, one
// that did not answer in time until it has answered. It implements registry.Blobs over them. Close ends it.
type Origins struct {
	ring   *ring.Ring
	byID   map[string]*Origin
	all    []*Origin
	stall  time.Duration
	probes *prober
}

// Stall is the patience with an origin of the roles that are asked by others: less than these have.
const Stall = 2 * time.Second

// NewOrigins returns the origins of a cluster, with a client of each. All members must have URLs, and ids of their own.
// An origin that makes no progress for stall is given up where another can do the same, and after a fifth of it another
// one is asked as well. Who is asked by others has less patience than these have with it.
func NewOrigins(members []ring.Member, replicas int, stall time.Duration, hc *http.Client) (*Origins, error) {
	o := &Origins{byID: map[string]*Origin{}, stall: stall, probes: newProber()}
	var ids []string
	for _, m := range members {
		health := &health{}
		c, err := newOriginClient(m.URL, hc, health.observe)
		if err != nil {
			return nil, fmt.Errorf("origin %s: %w", m.ID, err)
		}
		m.URL = c.Base()
		or := &Origin{Member: m, OriginClient: c, health: health}
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

// Suspect has others asked before or until it has answered: for who saw by other means that it does not.
func (o *Origins) Suspect(or *Origin) { o.probes.suspect(or) }

// Close ends what the origins do by themselves. Requests go on.
func (o *Origins) Close() { o.probes.close() }

// All returns all origins in the order of the configuration.
func (o *Origins) All() []*Origin { return o.all }

// Get returns an origin by id, nil when it is not configured.
func (o *Origins) Get(id string) *Origin { return o.byID[id] }

// Ring returns who owns what.
func (o *Origins) Ring() *ring.Ring { return o.ring }

func (o *Origins) pick(ids []string) []*Origin {
	out := make([]*Origin, 0, len(ids))
	var dead []*Origin
	for _, id := range ids {
		if or := o.byID[id]; !or.Answers() {
			dead = append(dead, or)
		} else {
			out = append(out, or)
		}
	}
	return append(out, dead...)
}

// For returns all origins in rendezvous order for d, those that do not answer last.
func (o *Origins) For(d digest.Digest) []*Origin { return o.pick(o.ring.Order(d)) }

// Owners returns the owners of d, those that do not answer last.
func (o *Origins) Owners(d digest.Digest) []*Origin { return o.pick(o.ring.Owners(d)) }

// Question is what origins are asked, see transport.Question.
type Question[T any] = transport.Question[*Origin, T]

// Ask asks origins, the first ones of from first, until want of them have succeeded; see transport.Ask. Those that did
// not answer in time are asked last from then on, until they have answered.
func Ask[T any](ctx context.Context, o *Origins, from []*Origin, want int, q Question[T]) transport.Asked[*Origin, T] {
	q.IsSilent = func(or *Origin) bool { return !or.Answers() }
	out := transport.Ask(ctx, from, transport.Hedge{Want: want, After: o.stall / 5, Stall: o.stall}, q)
	if ctx.Err() == nil {
		for _, or := range out.Silent {
			o.probes.suspect(or)
		}
	}
	return out
}

// isEverybodys reports whether one origin's error is the answer of all. An owner looks at the others and at the bucket
// by itself, so that it says 404 when it could ask all, and ErrUnavailable when it could not.
func isEverybodys(err error) bool {
	return errors.Is(err, registry.ErrBlobUnknown) || errors.Is(err, registry.ErrDigestInvalid) || errors.Is(err, registry.ErrNameInvalid)
}

// first returns the answer of the first of from that has one.
func first[T any](ctx context.Context, o *Origins, d digest.Digest, from []*Origin, q Question[T]) (T, *Origin, error) {
	q.IsFinal = isEverybodys
	out := Ask(ctx, o, from, 1, q)
	if len(out.Answers) > 0 {
		return out.Answers[0].Value, out.Answers[0].From, nil
	}
	var none T
	if out.Final != nil {
		return none, nil, out.Final
	}
	return none, nil, &registry.RetryError{Err: fmt.Errorf("%w: blob %s: %w", registry.ErrUnavailable, d, errors.Join(out.Errs...)), After: time.Second}
}

// StatBlob implements registry.Blobs.
func (o *Origins) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	desc, _, err := first(ctx, o, d, o.For(d), Question[v1.Descriptor]{Ask: func(ctx context.Context, or *Origin) (v1.Descriptor, error) {
		return or.StatBlob(ctx, repo, d)
	}})
	return desc, err
}

var errNoOrigin = errors.New("no origin is configured")
