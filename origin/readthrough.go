package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/jellydator/ttlcache/v3"
	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/blob"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// blobSource is where a blob is read from that is on no origin's disk: a bucket, or a registry that the cluster
// mirrors.
type blobSource interface {
	// open reads n bytes from off on, or to the end where n is -1, and returns the size of the whole blob. With
	// errNoRange the body is the whole blob, from its first byte: ranges are ignored there.
	open(ctx context.Context, off, n int64) (body io.ReadCloser, size int64, err error)
	// openAhead is open for who does not need the bytes yet: it fails where it would wait until another body of the
	// place is closed.
	openAhead(ctx context.Context, off, n int64) (body io.ReadCloser, size int64, err error)
}

var errNoRange = errors.New("ranges are ignored there")

// bucketSource is a blob in a bucket.
type bucketSource struct {
	bucket bucket.Bucket
	digest digest.Digest
	size   int64
}

func (p bucketSource) open(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	r, err := p.bucket.Open(ctx, layout.BlobKey(p.digest), off, n)
	return r, p.size, err
}

func (p bucketSource) openAhead(ctx context.Context, off, n int64) (io.ReadCloser, int64, error) {
	return p.open(ctx, off, n)
}

// fetch is a blob on its way from a place to this disk, read by many while it comes.
type fetch struct {
	o        *Origin
	id       fetchID
	d        digest.Digest
	repo     string
	size     int64
	from     *parts
	upstream bool                          // from a registry, not from the bucket
	owed     func() (*store.Marker, error) // nil: the blob is not owed to the bucket
	u        *store.Upload
	g        *store.Growth
	m        *blob.Metainfo // provisional
	leases   *leases        // of its pieces, until it is whole

	mu   sync.Mutex
	over bool
	err  error
	refs int // readers, and one for the writer
}

// joinFetch returns the fetch id that is under way here, or the one that begin has begun, for all who ask the same at
// once; of a blob that is whole here, one that is over. When ctx is done before, begin goes on for who asks next.
func (o *Origin) joinFetch(ctx context.Context, id fetchID, asked string, begin func(context.Context) (*fetch, error)) (*fetch, error) {
	ch := o.fetching.DoChan(asked, func() (any, error) {
		if f := o.underWay(id); f != nil {
			return f, nil
		}
		if i, err := o.store.Stat(id.digest); err == nil { // it has become whole since the caller looked
			return &fetch{o: o, id: id, d: id.digest, size: i.Size, over: true}, nil
		}
		var f *fetch
		var err error
		if over := o.shared(ctx, func(ctx context.Context) { f, err = begin(ctx) }); over != nil || err != nil {
			return nil, errors.Join(over, err)
		}
		if there := o.enter(f); there != nil { // begun meanwhile, by way of another repository
			f.drop(errors.Join(errBegunTwice, f.from.Close()))
			return there, nil
		}
		if !o.Background(f.run) {
			f.end(errors.Join(errShuttingDown, f.from.Close()))
		}
		return f, nil
	})
	select {
	case r := <-ch:
		if r.Err != nil {
			return nil, r.Err
		}
		return r.Val.(*fetch), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// shared runs f for all who wait for what comes of it: with the values of ctx, but until this origin ends, which waits
// for it. errShuttingDown when that has begun.
func (o *Origin) shared(ctx context.Context, f func(context.Context)) error {
	done := make(chan struct{})
	if !o.Background(func(own context.Context) {
		defer close(done)
		ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
		defer cancel(nil)
		defer context.AfterFunc(own, func() { cancel(errShuttingDown) })()
		f(ctx)
	}) {
		return errShuttingDown
	}
	<-done
	return nil
}

// underWay returns the fetch id, nil where it is not under way.
func (o *Origin) underWay(id fetchID) *fetch {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.fetches[id]
}

// enter makes f the fetch of its id, or returns the one that is.
func (o *Origin) enter(f *fetch) (there *fetch) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if there = o.fetches[f.id]; there == nil {
		o.fetches[f.id] = f
	}
	return there
}

var errBegunTwice = errors.New("the same is fetched already")

var errShuttingDown = fmt.Errorf("%w: this origin is shutting down", registry.ErrUnavailable)

// readThrough joins the fetch of d from the bucket, or begins it.
func (o *Origin) readThrough(ctx context.Context, repo string, d digest.Digest) (*fetch, error) {
	id := fromBucket(d)
	return o.joinFetch(ctx, id, question{fetchID: id}.key(), func(ctx context.Context) (*fetch, error) {
		b, obj, err := o.inBucket(ctx, repo, d)
		if err != nil {
			return nil, err
		}
		return o.newFetch(repo, id, newParts(o.Context(), bucketSource{b, d, obj.Size}, obj.Size))
	})
}

// newFetch makes room for a blob of which from reads the bytes. It closes from when it fails.
func (o *Origin) newFetch(repo string, id fetchID, from *parts) (_ *fetch, err error) {
	d := id.digest
	f := &fetch{o: o, id: id, d: d, repo: repo, size: from.size, from: from, refs: 1, leases: newLeases(o.cfg.Leasers)}
	f.leases.spread = o.leases.spread
	defer func() {
		if err != nil {
			from.Close()
		}
	}()
	if f.m, err = blob.Provisional(d, f.size, id.host); err != nil {
		return nil, fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
	}
	if f.u, err = o.store.NewUpload(store.UploadOptions{Size: f.size, Digest: d, Note: repo, Transient: true}); err != nil {
		return nil, err
	}
	if f.g, err = f.u.Growth(); err != nil {
		return nil, errors.Join(err, f.u.Abort())
	}
	return f, nil
}

// run fetches the blob.
func (f *fetch) run(ctx context.Context) {
	began := time.Now()
	err := f.copy(ctx)
	if err == nil {
		f.o.leases.adopt(f.d, f.leases)
	}
	f.end(err)
	if err != nil {
		f.o.log.Warn("read-through failed", "repository", f.repo, "digest", f.d, "error", err)
		return
	}
	if f.upstream {
		f.o.m.fromUpstream.Inc()
		f.o.m.fromUpstreamBytes.Add(float64(f.size))
		f.o.log.Info("fetched from upstream", "repository", f.repo, "digest", f.d, "size", f.size, "took", time.Since(began).Round(time.Millisecond))
	} else {
		f.o.m.readThrough.Inc()
	}
	f.o.committed(f.d)
}

// end says what came of the fetch. A blob of an upstream that failed is refused for a while to who reads it from there,
// so that runtimes go on at the upstream themselves.
func (f *fetch) end(err error) {
	if err != nil && f.upstream {
		f.o.m.upstreamErrors.Inc()
		if !isNo(err) { // which is said of one repository
			f.o.refused.Set(f.id, err, ttlcache.DefaultTTL)
		}
	}
	f.o.mu.Lock()
	delete(f.o.fetches, f.id)
	f.o.mu.Unlock()
	f.drop(err)
}

// drop ends the fetch for its readers, and the use of its session.
func (f *fetch) drop(err error) {
	f.mu.Lock()
	f.over, f.err = true, err
	f.mu.Unlock()
	f.g.End(err)
	f.release()
	if err != nil {
		if aerr := f.u.Abort(); aerr != nil && !errors.Is(aerr, store.ErrUploadUnknown) {
			f.o.log.Warn("session of a failed read-through stays until it expires", "error", aerr)
		}
	}
}

// copy writes the blob to the disk and verifies it.
func (f *fetch) copy(ctx context.Context) (err error) {
	defer f.from.Close()
	if _, err := f.u.Write(ctx, 0, f.from); err != nil {
		return err
	}
	var m *store.Marker
	if f.owed != nil {
		if m, err = f.owed(); err != nil {
			return err
		}
	}
	_, err = f.u.Commit(ctx, f.d, m)
	return err
}

// release closes the file after the last reader and the writer.
func (f *fetch) release() {
	f.mu.Lock()
	f.refs--
	last := f.refs == 0
	f.mu.Unlock()
	if last {
		f.g.Close()
	}
}

// open returns the blob to be read while it comes. The last byte comes only when the whole was verified.
func (f *fetch) open(ctx context.Context) (*registry.Content, error) {
	f.mu.Lock()
	if f.over {
		err := f.err
		f.mu.Unlock()
		if err != nil {
			return nil, fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
		}
		return f.o.local(f.d)
	}
	f.refs++
	f.mu.Unlock()
	var once sync.Once
	return &registry.Content{Digest: f.d, Size: f.size, Body: store.Follow(ctx, f.g, f.size, store.HoldFromAll), Close: func() error {
		once.Do(func() { f.release() })
		return nil
	}}, nil
}
