package upstream

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"path"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/time/rate"

	"kraken/proto/config"
	"kraken/proto/registry"
)

// Registry is one registry outside the cluster. Its errors are those of package registry: ErrManifestUnknown and
// ErrBlobUnknown say that the upstream answered so, ErrUnauthorized and ErrDenied that it refused, ErrUnavailable all
// else, also 429, with the time after which it may be asked again.
type Registry struct {
	// Host is the registry's, with its port where it has one.
	Host string
	RegistryConfig

	set    *Set
	places []*place
	as     *Credential // of a caller; nil is the cluster
	blobs  *slots
	names  *slots
	limit  *rate.Limiter
	doubts *doubts
}

// ErrNoRange is an upstream that answers a range with the whole blob.
var ErrNoRange = errors.New("the upstream ignores ranges")

// As returns the registry as it is asked with a caller's credential, which goes to the registry's own host alone, by
// TLS, and to where that challenges. ErrUnavailable where there is no such way to it.
func (r *Registry) As(c Credential) (*Registry, error) {
	own := *r
	own.as, own.places = &c, nil
	for _, p := range r.places {
		if p.url.Scheme == "https" && p.prefix == "" && hostPort(p.url) == hostPort(mustURL(ownURL(r.Host, false))) {
			own.places = append(own.places, p)
		}
	}
	if len(own.places) == 0 {
		return nil, fmt.Errorf("%w: a caller's credential goes to https://%s alone, and that is none of its endpoints", registry.ErrUnavailable, r.Host)
	}
	return &own, nil
}

func mustURL(s string) *url.URL {
	u, err := url.Parse(s)
	if err != nil {
		return &url.URL{}
	}
	return u
}

// Grant returns a keyed hash of the credential for a registry, by which a grant is found. The key is this process's.
func (s *Set) Grant(host string, c Credential) string {
	d := c.digest(s.key)
	return host + " " + string(d[:])
}

// errSilent is that a place did not answer in time: before the deadline of who asks, or before that one lost patience
// and ended the context with a cause that is context.DeadlineExceeded. Who went away otherwise tells nothing of it.
var errSilent = errors.New("no answer in time")

// Reader names who the registry is asked as: the cluster, nobody, or a caller, by a hash of the credential that is
// keyed by this process. What the registry says to one is not said to another.
func (r *Registry) Reader() string {
	switch {
	case r.as == nil:
		return "cluster"
	case r.as.none():
		return "nobody"
	}
	d := r.as.digest(r.set.key)
	return string(d[:])
}

// Offline reports whether the registry is not asked.
func (r *Registry) Offline() bool { return r.set.cfg.Offline || r.RegistryConfig.Offline }

// StatBlob returns the size of a blob, -1 where the upstream does not tell.
func (r *Registry) StatBlob(ctx context.Context, remote string, d digest.Digest) (size int64, err error) {
	return ask(ctx, r, kindStat, remote, func(ctx context.Context, p *place, repo string) (int64, error) {
		resp, err := p.client.Do(ctx, registry.Request{Method: http.MethodHead, To: registry.BlobEndpoint(repo, d)}, http.StatusOK)
		if err != nil {
			return 0, err
		}
		return resp.ContentLength, resp.Body.Close()
	})
}

// Head asks what a tag or a digest is.
func (r *Registry) Head(ctx context.Context, remote string, ref registry.Reference) (v1.Descriptor, error) {
	return ask(ctx, r, kindHead, remote, func(ctx context.Context, p *place, repo string) (v1.Descriptor, error) {
		return p.client.StatManifest(ctx, repo, ref)
	})
}

// Manifest reads a manifest. Its bytes are those of its digest, and of the one that was asked for.
func (r *Registry) Manifest(ctx context.Context, remote string, ref registry.Reference) (*registry.Manifest, error) {
	return ask(ctx, r, kindManifest, remote, func(ctx context.Context, p *place, repo string) (*registry.Manifest, error) {
		m, err := p.client.GetManifest(ctx, repo, ref, registry.GetOptions{})
		if err == nil && strings.HasPrefix(m.MediaType, "application/vnd.docker.distribution.manifest.v1+") {
			return nil, fmt.Errorf("%w: %s of %s is of schema 1, which runtimes don't take any more", registry.ErrManifestUnknown, ref, remote)
		}
		return m, err
	})
}

// Tags is one page of a repository's tags. ErrNameUnknown when there is no such repository.
func (r *Registry) Tags(ctx context.Context, remote string, page registry.Page) (registry.Names, error) {
	out, err := ask(ctx, r, kindTags, remote, func(ctx context.Context, p *place, repo string) (registry.Names, error) {
		return p.client.ListTags(ctx, repo, page)
	})
	if errors.Is(err, registry.ErrManifestUnknown) {
		err = fmt.Errorf("%w: repository %s at %s", registry.ErrNameUnknown, remote, r.Host)
	}
	return out, err
}

// maxReferrerPages bounds the pages of one list; its bytes are those of a manifest at most. One that has more is none,
// and not cut: who looks for a signature must not be told that there is none.
const maxReferrerPages = 20

// Referrers lists the manifests whose subject is d. ErrManifestUnknown where the registry does not have the API: the
// tag schema is asked then.
func (r *Registry) Referrers(ctx context.Context, remote string, d digest.Digest) ([]v1.Descriptor, error) {
	return ask(ctx, r, kindReferrers, remote, func(ctx context.Context, p *place, repo string) (out []v1.Descriptor, err error) {
		cursor, size := "", 0
		for range maxReferrerPages {
			page, err := p.client.ListReferrers(ctx, repo, d, "", cursor)
			if err != nil {
				return nil, err
			}
			b, err := json.Marshal(page.Descriptors)
			if err != nil {
				return nil, err
			}
			if size += len(b); size > registry.MaxManifest {
				return nil, fmt.Errorf("%w: the list of referrers of %s at %s has more than %d bytes", registry.ErrUnavailable, d, r.Host, registry.MaxManifest)
			}
			out = append(out, page.Descriptors...)
			if page.Next == "" {
				return out, nil
			}
			if page.Next == cursor {
				return nil, fmt.Errorf("%w: the list of referrers of %s at %s goes on where it was", registry.ErrUnavailable, d, r.Host)
			}
			cursor = page.Next
		}
		return nil, fmt.Errorf("%w: the list of referrers of %s at %s has more than %d pages", registry.ErrUnavailable, d, r.Host, maxReferrerPages)
	})
}

// OpenBlob reads n bytes of a blob from an offset, to its end where n is negative, and returns its whole size, -1 where
// the upstream does not tell. The caller closes body; ctx bounds its life. Where the upstream ignores the range the
// error is ErrNoRange, and body has the whole blob from its first byte. Neither length nor digest of the body is
// checked.
func (r *Registry) OpenBlob(ctx context.Context, remote string, d digest.Digest, off, n int64) (body io.ReadCloser, size int64, err error) {
	release, err := r.Slot(ctx)
	if err != nil {
		return nil, 0, err
	}
	return r.OpenBlobIn(ctx, release, remote, d, off, n)
}

// Slot waits until one more blob may be read, and takes its place, which release gives back.
func (r *Registry) Slot(ctx context.Context) (release func(), err error) { return r.blobs.take(ctx) }

// OpenBlobAhead is OpenBlob for who does not need the bytes yet: ErrUnavailable at once where as many blobs are being
// read as may be. Who holds a body may wait for this one, since it waits for none.
func (r *Registry) OpenBlobAhead(ctx context.Context, remote string, d digest.Digest, off, n int64) (body io.ReadCloser, size int64, err error) {
	release, free := r.blobs.takeFree()
	if !free {
		return nil, 0, fmt.Errorf("%w: %d blobs of %s are being read", registry.ErrUnavailable, cap(r.blobs.free), r.Host)
	}
	return r.OpenBlobIn(ctx, release, remote, d, off, n)
}

// OpenBlobIn is OpenBlob for who has a slot. It is given back when body is closed, or when there is none.
func (r *Registry) OpenBlobIn(ctx context.Context, release func(), remote string, d digest.Digest, off, n int64) (body io.ReadCloser, size int64, err error) {
	h := http.Header{}
	if off > 0 || n >= 0 {
		v := fmt.Sprintf("bytes=%d-", off)
		if n > 0 {
			v += strconv.FormatInt(off+n-1, 10)
		}
		h.Set("Range", v)
	}
	var from *place
	resp, err := askOf(ctx, r, r.doubts.last(r.places, d), kindBlob, remote, func(ctx context.Context, p *place, repo string) (*http.Response, error) {
		from = p
		return p.client.Do(ctx, registry.Request{Method: http.MethodGet, To: registry.BlobEndpoint(repo, d), Header: h}, http.StatusOK, http.StatusPartialContent)
	})
	if err != nil {
		release()
		return nil, 0, err
	}
	body = &blobBody{ReadCloser: resp.Body, ctx: ctx, r: r, d: d, from: from, release: release}
	if resp.StatusCode == http.StatusOK {
		if h.Get("Range") != "" {
			err = ErrNoRange
		}
		return body, resp.ContentLength, err
	}
	first, size, err := contentRange(resp.Header.Get("Content-Range"))
	if err != nil || first != off {
		err = fmt.Errorf("%w: blob %s of %s: the answer to byte %d has Content-Range %.60q", registry.ErrUnavailable, d, remote, off, resp.Header.Get("Content-Range"))
		return nil, 0, errors.Join(err, body.Close())
	}
	return body, size, nil
}

// contentRange reads the first byte and the whole size of a Content-Range, -1 for an unknown size.
func contentRange(v string) (first, size int64, err error) {
	unit, rest, _ := strings.Cut(strings.TrimSpace(v), " ")
	span, total, found := strings.Cut(rest, "/")
	from, to, dash := strings.Cut(span, "-")
	bad := fmt.Errorf("unreadable Content-Range %.60q", v)
	if !strings.EqualFold(unit, "bytes") || !found || !dash {
		return 0, 0, bad
	}
	first, err = strconv.ParseInt(from, 10, 64)
	last, lerr := strconv.ParseInt(to, 10, 64)
	size = -1
	var serr error
	if total != "*" {
		size, serr = strconv.ParseInt(total, 10, 64)
	}
	if err != nil || lerr != nil || serr != nil || first < 0 || last < first || size >= 0 && last >= size {
		return 0, 0, bad
	}
	return first, size, nil
}

// ask asks the places of a registry in order until one has an answer. A place that says that it does not have it, and
// one that can't be asked, are passed over; what is not there is so only if all said so.
func ask[T any](ctx context.Context, r *Registry, k kind, remote string, f func(ctx context.Context, p *place, repo string) (T, error)) (T, error) {
	return askOf(ctx, r, r.places, k, remote, f)
}

func askOf[T any](ctx context.Context, r *Registry, places []*place, k kind, remote string, f func(ctx context.Context, p *place, repo string) (T, error)) (out T, err error) {
	if r.Offline() {
		return out, fmt.Errorf("%w: no upstream is asked (offline)", registry.ErrUnavailable)
	}
	if k != kindBlob {
		release, err := r.names.take(ctx)
		if err != nil {
			return out, err
		}
		defer release()
	}
	var worst error
	for _, p := range places {
		repo := path.Join(p.prefix, remote)
		err := p.mayAsk(k, r.Reader())
		if err == nil {
			began := time.Now()
			out, err = f(withScope(ctx, repo, r.as), p, repo)
			took := time.Since(began)
			if err != nil && ctx.Err() != nil && errors.Is(context.Cause(ctx), context.DeadlineExceeded) {
				err = fmt.Errorf("%w: %w", errSilent, err)
			} else if ctx.Err() != nil && err != nil {
				return out, fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
			}
			r.set.m.asked(r.RegistryConfig.Registry, k, err, took)
			err = p.note(k, r.Reader(), err, took)
		}
		if err == nil {
			return out, nil
		}
		if worst == nil || rank(err) > rank(worst) {
			worst = err
		}
	}
	return out, fmt.Errorf("upstream %s: %w", r.Host, worst)
}

// rank orders errors by how little is known: of several places' answers the one that leaves most open counts.
func rank(err error) int {
	switch {
	case errors.Is(err, registry.ErrUnavailable):
		return 3
	case errors.Is(err, registry.ErrUnauthorized), errors.Is(err, registry.ErrDenied):
		return 2
	}
	return 1
}

// doubts are places that lately failed to give a blob.
type doubts struct {
	mu    sync.Mutex
	until map[doubt]time.Time
}

type doubt struct {
	place *place
	d     digest.Digest
}

// Bounds of doubts.
const (
	doubtFor  = time.Minute
	maxDoubts = 1024
)

func (o *doubts) note(p *place, d digest.Digest) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.until == nil || len(o.until) >= maxDoubts {
		o.until = map[doubt]time.Time{}
	}
	o.until[doubt{p, d}] = time.Now().Add(doubtFor)
}

// last returns places with those last that failed to give a blob.
func (o *doubts) last(places []*place, d digest.Digest) []*place {
	if len(places) < 2 {
		return places
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	now := time.Now()
	doubted := func(p *place) int {
		if now.Before(o.until[doubt{p, d}]) {
			return 1
		}
		return 0
	}
	places = slices.Clone(places)
	slices.SortStableFunc(places, func(a, b *place) int { return doubted(a) - doubted(b) })
	return places
}

// slots bound what is under way at once.
type slots struct{ free chan struct{} }

func newSlots(n int) *slots { return &slots{make(chan struct{}, max(n, 1))} }

// take waits for a slot; the caller gives it back.
func (s *slots) take(ctx context.Context) (release func(), err error) {
	select {
	case s.free <- struct{}{}:
		return sync.OnceFunc(func() { <-s.free }), nil
	case <-ctx.Done():
		return nil, fmt.Errorf("%w: %w", registry.ErrUnavailable, context.Cause(ctx))
	}
}

// takeFree takes a slot where one is free; the caller gives it back.
func (s *slots) takeFree() (release func(), free bool) {
	select {
	case s.free <- struct{}{}:
		return sync.OnceFunc(func() { <-s.free }), true
	default:
		return nil, false
	}
}

// burst is how much comes at once where a rate is set.
const burst = 1 << 20

func newLimit(r config.Rate) *rate.Limiter {
	if r == 0 {
		return rate.NewLimiter(rate.Inf, burst)
	}
	return rate.NewLimiter(rate.Limit(r), burst)
}

// blobBody is a blob's body, counted and within the registry's rate.
type blobBody struct {
	io.ReadCloser
	ctx     context.Context
	r       *Registry
	d       digest.Digest
	from    *place
	release func()
}

func (b *blobBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p[:min(len(p), burst)])
	b.r.set.m.received(b.r.RegistryConfig.Registry, n)
	if err != nil && err != io.EOF && b.ctx.Err() == nil {
		b.r.doubts.note(b.from, b.d)
	}
	if n > 0 && b.r.limit.Limit() != rate.Inf {
		if werr := b.r.limit.WaitN(b.ctx, n); werr != nil && err == nil {
			err = werr
		}
	}
	return n, err
}

// Doubt says that what a body of OpenBlob brought was not the blob: for a minute reads of it begin at another endpoint,
// where there is one. A body that failed to its reader is doubted already.
func Doubt(body io.ReadCloser) {
	if b, ok := body.(*blobBody); ok {
		b.r.doubts.note(b.from, b.d)
	}
}

func (b *blobBody) Close() error {
	err := b.ReadCloser.Close()
	b.release()
	return err
}
