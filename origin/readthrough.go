package origin

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// fetch is a blob on its way from the bucket to this disk, read by many while it comes.
type fetch struct {
	o    *Origin
	d    digest.Digest
	size int64
	u    *store.Upload
	g    *store.Growth

	mu   sync.Mutex
	over bool
	err  error
	refs int // readers, and one for the writer
}

// readThrough joins the fetch of d from the bucket, or begins it.
func (o *Origin) readThrough(ctx context.Context, repo string, d digest.Digest) (*fetch, error) {
	v, err, _ := o.fetching.Do(d.String(), func() (any, error) {
		o.mu.Lock()
		f := o.fetches[d]
		o.mu.Unlock()
		if f != nil {
			return f, nil
		}
		b, obj, err := o.inBucket(context.WithoutCancel(ctx), repo, d)
		if err != nil {
			return nil, err
		}
		f = &fetch{o: o, d: d, size: obj.Size, refs: 1}
		if f.u, err = o.store.NewUpload(store.UploadOptions{Size: obj.Size, Digest: d, Note: repo, Transient: true}); err != nil {
			return nil, err
		}
		if f.g, err = f.u.Growth(); err != nil {
			return nil, errors.Join(err, f.u.Abort())
		}
		o.mu.Lock()
		o.fetches[d] = f
		o.mu.Unlock()
		o.Background(func(ctx context.Context) { f.run(ctx, b) })
		return f, nil
	})
	if err != nil {
		return nil, err
	}
	return v.(*fetch), nil
}

func (f *fetch) run(ctx context.Context, b bucket.Bucket) {
	err := f.copy(ctx, b)
	f.mu.Lock()
	f.over, f.err = true, err
	f.mu.Unlock()
	f.g.End(err)
	f.o.mu.Lock()
	delete(f.o.fetches, f.d)
	f.o.mu.Unlock()
	f.release()
	if err != nil {
		f.o.log.Warn("read-through failed", "digest", f.d, "error", err)
		if aerr := f.u.Abort(); aerr != nil && !errors.Is(aerr, store.ErrUploadUnknown) {
			f.o.log.Warn("session of a failed read-through stays until it expires", "error", aerr)
		}
		return
	}
	f.o.m.readThrough.Inc()
	f.o.committed(f.d)
}

func (f *fetch) copy(ctx context.Context, b bucket.Bucket) error {
	r, err := b.Open(ctx, layout.BlobKey(f.d), 0, -1)
	if err != nil {
		return err
	}
	defer r.Close()
	if _, err := f.u.Write(ctx, 0, r); err != nil {
		return err
	}
	_, err = f.u.Commit(ctx, f.d, nil)
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
