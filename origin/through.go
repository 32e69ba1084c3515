package origin

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

const (
	// upstreamPatience is how long the first byte of an upstream is waited for: less than runtimes wait for a header.
	upstreamPatience = 25 * time.Second
	// pendingWait is how long one answer says nothing while the upstream has not answered yet. Who asks asks again, and
	// so tells an upstream that is slow from an origin that hangs.
	pendingWait = time.Second
	// maxBehind bounds the questions that go on after their reader has gone: an eighth, so one, for each registry.
	maxBehind = 8
	// askPatience is how long another origin may say nothing.
	askPatience = 3 * time.Second
	// refuseFor is how long a blob is refused whose fetch from its upstream failed.
	refuseFor = 5 * time.Second
)

// errPending says that the upstream has not answered yet.
var errPending = fmt.Errorf("%w: the upstream has not answered yet", registry.ErrUnavailable)

// errUpstreamHangs is the cause of a question's end that was waited for long enough: the registry is left alone then.
var errUpstreamHangs = fmt.Errorf("%w: %w", errPending, context.DeadlineExceeded)

// mirrored is one repository of a registry that the cluster mirrors.
type mirrored struct {
	registry *upstream.Registry
	remote   string // the repository's name there
}

// upstreamOf returns where the blobs of a repository come from that are nowhere in the cluster; false where that is its
// bucket alone. In mode caller the upstream is asked with what the request carries.
func (o *Origin) upstreamOf(ctx context.Context, repo string) (mirrored, bool) {
	r, remote, ok := o.upstreams.ForRequest(ctx, repo)
	return mirrored{r, remote}, ok
}

// keeps reports whether a blob of a size is kept; else it is passed on.
func (u mirrored) keeps(size int64) bool {
	return !u.registry.Relay && (u.registry.RelayAbove == 0 || size <= int64(u.registry.RelayAbove))
}

// negativeTTL is how long a no of the upstream counts.
func (u mirrored) negativeTTL() time.Duration { return time.Duration(u.registry.NegativeTTL) }

// upstreamSource is a blob at an upstream.
type upstreamSource struct {
	mirrored
	digest digest.Digest
}

func (p upstreamSource) open(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	return p.sized(ctx, func() (io.ReadCloser, int64, error) { return p.registry.OpenBlob(ctx, p.remote, p.digest, off, n) })
}

// openIn is open for who has a slot of the registry, which goes with the body.
func (p upstreamSource) openIn(ctx context.Context, slot func(), off, n int64) (io.ReadCloser, int64, error) {
	return p.sized(ctx, func() (io.ReadCloser, int64, error) {
		return p.registry.OpenBlobIn(ctx, slot, p.remote, p.digest, off, n)
	})
}

func (p upstreamSource) openAhead(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	return p.sized(ctx, func() (io.ReadCloser, int64, error) { return p.registry.OpenBlobAhead(ctx, p.remote, p.digest, off, n) })
}

// sized opens the blob and returns its size, also where the upstream did not say it with the bytes.
func (p upstreamSource) sized(ctx context.Context, open func() (io.ReadCloser, int64, error)) (io.ReadCloser, int64, error) {
	body, size, err := open()
	var whole error
	if errors.Is(err, upstream.ErrNoRange) {
		whole, err = errNoRange, nil
	}
	if err != nil {
		return nil, 0, err
	}
	if size < 0 { // it is sent in chunks
		if size, err = p.registry.StatBlob(ctx, p.remote, p.digest); err == nil && size < 0 {
			err = fmt.Errorf("%w: the upstream does not say how large %s is", registry.ErrUnavailable, p.digest)
		}
		if err != nil {
			return nil, 0, errors.Join(err, body.Close())
		}
	}
	return body, size, whole
}

// refusal returns why a blob is refused now, nil where it is not.
func (o *Origin) refusal(id fetchID) error {
	lately := o.refused.Get(id)
	if lately == nil {
		return nil
	}
	return &registry.RetryError{Err: fmt.Errorf("%w: blob %s lately could not be read from %s: %w", registry.ErrUnavailable, id.digest, id.host, lately.Value()), After: refuseFor}
}

// lately returns why an upstream is not asked for a blob now, nil where it is.
func (o *Origin) lately(q question) error { return cmp.Or(o.refusal(q.fetchID), o.answers.no(q)) }

// fetchHere joins the fetch of d from its upstream by this origin, or begins it. errPending when the upstream has not
// answered within wait.
func (o *Origin) fetchHere(ctx context.Context, up mirrored, repo string, d digest.Digest, wait time.Duration) (*fetch, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, wait, errPending)
	defer cancel()
	q := up.question(d)
	return o.joinFetch(ctx, q.fetchID, q.key(), func(context.Context) (*fetch, error) {
		if err := o.lately(q); err != nil {
			return nil, err
		}
		if size, known := o.answers.knows(q); up.registry.Relay || known && !up.keeps(size) {
			return nil, errNotKept // and nobody is asked for bytes that are not wanted
		}
		release, err := o.waiting.Take(up.registry)
		if err != nil {
			return nil, err
		}
		defer release()
		return o.beginUpstream(up, repo, d)
	})
}

// beginUpstream asks the upstream for a blob and makes room for it here.
func (o *Origin) beginUpstream(up mirrored, repo string, d digest.Digest) (*fetch, error) {
	ctx, cancel := context.WithCancelCause(o.Context())
	limit := time.AfterFunc(o.patience, func() { cancel(errUpstreamHangs) })
	p := upstreamSource{up, d}
	body, size, err := p.open(ctx, 0, -1)
	limit.Stop()
	o.answers.note(p.question(d), size, err, up.negativeTTL())
	if err != nil {
		cancel(nil)
		return nil, err
	}
	from := newParts(ctx, p, size)
	from.body, from.end, from.ahead.slots = body, func() { cancel(nil) }, o.segments
	if !up.keeps(size) {
		from.Close()
		return nil, errNotKept
	}
	f, err := o.newFetch(repo, up.question(d).fetchID, from)
	if err != nil {
		return nil, err
	}
	f.upstream = true
	if up.registry.WriteBack {
		f.owed = func() (*store.Marker, error) {
			m, err := o.marker(repo)
			return &m, err
		}
	}
	return f, nil
}

// errNotKept says that a blob is passed on and not kept.
var errNotKept = errors.New("blobs like this are passed on")

// through opens a blob of an upstream's repository that no disk of the cluster has. The first origin in rendezvous
// order that answers fetches it, and the others pass on what comes there: so there is one fetch however many are asked,
// and when that origin dies the next one begins.
func (o *Origin) through(ctx context.Context, up mirrored, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	deadline := time.Now().Add(upstreamPatience)
	for {
		a, err := o.arriving(ctx, repo, d, cluster.ArrivingRequest{})
		switch {
		case errors.Is(err, errNotKept), errors.Is(err, store.ErrFull):
			return o.passOn(ctx, up, repo, d, hint)
		case err != nil:
			return nil, err
		case a.Pending && time.Now().After(deadline):
			return nil, &registry.RetryError{Err: errPending, After: time.Second}
		case a.Pending:
			continue
		case a.Passed:
			return o.passOn(ctx, up, repo, d, hint)
		case a.Origin != o.cfg.ID:
			return o.openAt(ctx, a.Origin, repo, d, hint)
		}
		if f := o.inFlight(ctx, repo, d); f != nil {
			return f.open(ctx)
		}
		return o.local(d) // it has become whole
	}
}

// passOn is pass, and 404 only when neither an origin nor the bucket may have the blob.
func (o *Origin) passOn(ctx context.Context, up mirrored, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	c, err := o.pass(ctx, up, d, hint)
	if errors.Is(err, registry.ErrBlobUnknown) {
		if _, serr := o.StatBlob(ctx, repo, d); serr == nil {
			err = &registry.RetryError{Err: fmt.Errorf("%w: blob %s has come meanwhile", registry.ErrUnavailable, d), After: time.Second}
		} else {
			err = serr
		}
	}
	return c, err
}

// openAt opens a blob at the origin that another one named.
func (o *Origin) openAt(ctx context.Context, origin, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	or := o.origins.Get(origin)
	if or == nil {
		return nil, &registry.RetryError{Err: fmt.Errorf("%w: blob %s: it is said to be at %.60q, which is no origin that this one knows", registry.ErrUnavailable, d, origin), After: time.Second}
	}
	return or.OpenBlob(ctx, repo, d, hint)
}

// arriving says how far a blob is, here or at the origin that fetches it, and has it fetched where it is not.
func (o *Origin) arriving(ctx context.Context, repo string, d digest.Digest, q cluster.ArrivingRequest) (cluster.Arriving, error) {
	if i, err := o.store.Stat(d); err == nil {
		return cluster.Arriving{Origin: o.cfg.ID, Size: i.Size, Whole: true}, nil
	}
	if f := o.inFlight(ctx, repo, d); f != nil {
		return f.arriving(ctx, q)
	}
	var unsure []error
	if !q.Here {
		or, desc, why := o.elsewhere(ctx, repo, d)
		if or != nil {
			return cluster.Arriving{Origin: or.ID, Size: desc.Size, Whole: true}, nil
		}
		unsure = why
	}
	up, isUpstream := o.upstreamOf(ctx, repo)
	if !isUpstream || up.registry.WriteBack {
		f, err := o.readThrough(ctx, repo, d)
		if err == nil {
			return f.arriving(ctx, q)
		}
		if !isUpstream {
			return cluster.Arriving{}, o.missing(d, unsure, err)
		}
		if !errors.Is(err, bucket.ErrNotFound) {
			unsure = append(unsure, err)
			o.log.Warn("the bucket was not asked for a blob that is read from its upstream", "repository", repo, "digest", d, "error", err)
		}
	}
	if q.Here {
		a, err := o.arrivingHere(ctx, up, repo, d, q)
		return a, o.unlessUnsure(d, unsure, err)
	}
	for _, or := range o.origins.For(d) {
		if or.ID == o.cfg.ID {
			break
		}
		a, err := or.Arriving(transport.WithProgressTimeout(ctx, askPatience), repo, d, cluster.ArrivingRequest{From: q.From, Wait: q.Wait, Here: true})
		if err == nil || registry.IsAnswer(err) && !errors.Is(err, registry.ErrUnsupported) {
			return a, o.unlessUnsure(d, unsure, err)
		}
		if ctx.Err() != nil {
			return a, context.Cause(ctx)
		}
		o.log.Info("the origin that would fetch a blob from its upstream does not answer, the next one does", "origin", or.ID, "digest", d, "error", err)
	}
	a, err := o.arrivingHere(ctx, up, repo, d, q)
	return a, o.unlessUnsure(d, unsure, err)
}

// arrivingHere has this origin fetch a blob from its upstream, and says how far that is.
func (o *Origin) arrivingHere(ctx context.Context, up mirrored, repo string, d digest.Digest, q cluster.ArrivingRequest) (cluster.Arriving, error) {
	f, err := o.fetchHere(ctx, up, repo, d, pendingWait)
	switch {
	case errors.Is(err, errPending):
		return cluster.Arriving{Origin: o.cfg.ID, Pending: true}, nil
	case errors.Is(err, errNotKept), errors.Is(err, store.ErrFull):
		return cluster.Arriving{Origin: o.cfg.ID, Passed: true}, nil
	case err != nil:
		return cluster.Arriving{}, fmt.Errorf("blob %s of %s: %w", d, repo, err)
	}
	return f.arriving(ctx, q)
}

// statUpstream asks the upstream how large a blob is.
func (o *Origin) statUpstream(ctx context.Context, up mirrored, d digest.Digest) (v1.Descriptor, error) {
	if err := o.lately(up.question(d)); err != nil {
		return v1.Descriptor{}, err
	}
	size, err := o.answers.size(ctx, up.question(d), up.registry, up.negativeTTL(), func() (size int64, err error) {
		over := o.shared(ctx, func(ctx context.Context) {
			ctx, cancel := context.WithTimeout(ctx, upstreamPatience)
			defer cancel()
			size, err = up.registry.StatBlob(ctx, up.remote, d)
		})
		return size, errors.Join(over, err)
	})
	return v1.Descriptor{Digest: d, Size: size}, err
}
