package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/blob"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// local opens what is on this disk.
func (o *Origin) local(d digest.Digest) (*registry.Content, error) {
	r, err := o.store.Open(d)
	if err != nil {
		return nil, wire(err)
	}
	return &registry.Content{Digest: d, Size: r.Info().Size, Body: r.File(), Close: r.Close}, nil
}

// StatBlob asks this disk, the other origins' disks and the bucket, in this order, and moves no bytes.
func (o *Origin) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	if i, err := o.store.Stat(d); err == nil {
		return v1.Descriptor{Digest: d, Size: i.Size}, nil
	}
	var unsure []error
	for _, or := range o.others(d) {
		desc, err := or.LocalStat(ctx, repo, d)
		if err == nil {
			return desc, nil
		}
		if !errors.Is(err, registry.ErrBlobUnknown) {
			unsure = append(unsure, fmt.Errorf("origin %s: %w", or.ID, err))
		}
	}
	_, obj, err := o.inBucket(ctx, repo, d)
	if err == nil {
		return v1.Descriptor{Digest: d, Size: obj.Size}, nil
	}
	return v1.Descriptor{}, o.missing(d, unsure, err)
}

// missing is 404 only when everybody who may have the blob said no.
func (o *Origin) missing(d digest.Digest, unsure []error, bucketErr error) error {
	if !errors.Is(bucketErr, bucket.ErrNotFound) {
		unsure = append(unsure, bucketErr)
	}
	if len(unsure) == 0 {
		return fmt.Errorf("%w: %s", registry.ErrBlobUnknown, d)
	}
	return &registry.RetryError{Err: fmt.Errorf("%w: blob %s: %w", registry.ErrUnavailable, d, errors.Join(unsure...)), After: time.Second}
}

// inBucket finds the blob in the bucket of the repository, else in any: bytes are global.
func (o *Origin) inBucket(ctx context.Context, repo string, d digest.Digest) (b bucket.Bucket, obj bucket.Object, err error) {
	name, first, ok := o.buckets.For(repo)
	var errs []error
	ask := func(c bucket.Bucket) bool {
		var err error
		if obj, err = c.Stat(ctx, layout.BlobKey(d)); err == nil {
			b = c
			return true
		}
		if !errors.Is(err, bucket.ErrNotFound) {
			errs = append(errs, err)
		}
		return false
	}
	if ok && ask(first) {
		return b, obj, nil
	}
	if err := o.buckets.All(func(n string, c bucket.Bucket) error {
		if (!ok || n != name) && ask(c) {
			return io.EOF // found
		}
		return nil
	}); err != nil {
		return b, obj, nil
	}
	if len(errs) > 0 {
		return nil, obj, errors.Join(errs...)
	}
	return nil, obj, fmt.Errorf("blob %s: %w", d, bucket.ErrNotFound)
}

// OpenBlob reads from this disk, from another origin's, or through from the bucket while the bytes come to this disk.
func (o *Origin) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	if c, err := o.local(d); err == nil {
		return c, nil
	}
	var unsure []error
	for _, or := range o.others(d) {
		c, err := or.LocalOpen(ctx, repo, d, hint)
		if err == nil {
			if o.origins.Ring().Owns(o.cfg.ID, d) {
				o.background(func(ctx context.Context) { o.copyFrom(ctx, or, repo, d) })
			}
			return c, nil
		}
		if !errors.Is(err, registry.ErrBlobUnknown) {
			unsure = append(unsure, fmt.Errorf("origin %s: %w", or.ID, err))
		}
	}
	f, err := o.readThrough(ctx, repo, d)
	if err != nil {
		return nil, o.missing(d, unsure, err)
	}
	return f.open(ctx)
}

// copyFrom heals an owner that lacks a blob which another origin has.
func (o *Origin) copyFrom(ctx context.Context, or *registry.Origin, repo string, d digest.Digest) {
	if _, again := o.busy.LoadOrStore(d, true); again {
		return
	}
	defer o.busy.Delete(d)
	c, err := or.LocalOpen(ctx, repo, d, registry.Whole)
	if err == nil {
		_, err = o.store.Ingest(ctx, d, c.Size, c.Body, nil)
		c.Close()
	}
	if err != nil {
		o.log.Info("blob was not copied from another origin", "digest", d, "origin", or.ID, "error", err)
		return
	}
	o.committed(d)
}

// fetch is a blob on its way from the bucket to this disk, read by many while it comes.
type fetch struct {
	o    *Origin
	d    digest.Digest
	size int64
	u    *store.Upload
	f    *os.File

	mu   sync.Mutex
	more chan struct{} // closed and replaced when bytes have come
	over bool
	err  error
	refs int
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
		f = &fetch{o: o, d: d, size: obj.Size, more: make(chan struct{})}
		if f.u, err = o.store.NewUpload(store.UploadOptions{Size: obj.Size, Digest: d, Note: repo, Transient: true}); err != nil {
			return nil, err
		}
		if f.f, err = f.u.Reader(); err != nil {
			return nil, errors.Join(err, f.u.Abort())
		}
		o.mu.Lock()
		o.fetches[d] = f
		o.mu.Unlock()
		o.background(func(ctx context.Context) { f.run(ctx, b) })
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
	close(f.more)
	f.more = make(chan struct{})
	f.mu.Unlock()
	f.o.mu.Lock()
	delete(f.o.fetches, f.d)
	f.o.mu.Unlock()
	f.release(0)
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
	if _, err := f.u.Write(ctx, 0, &announcing{r, f}); err != nil {
		return err
	}
	_, err = f.u.Commit(ctx, f.d, nil)
	return err
}

// announcing wakes the readers: what the last Read gave has been written by the time of the next.
type announcing struct {
	io.Reader
	f *fetch
}

func (a *announcing) Read(p []byte) (int, error) {
	a.f.mu.Lock()
	close(a.f.more)
	a.f.more = make(chan struct{})
	a.f.mu.Unlock()
	return a.Reader.Read(p)
}

// release closes the file after the last reader and the writer.
func (f *fetch) release(n int) {
	f.mu.Lock()
	f.refs -= n
	last := f.refs == 0 && f.over
	f.mu.Unlock()
	if last {
		f.f.Close()
	}
}

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
	return &registry.Content{Digest: f.d, Size: f.size, Body: &follower{f: f, ctx: ctx}, Close: func() error {
		once.Do(func() { f.release(1) })
		return nil
	}}, nil
}

// follower reads a fetch. The last byte comes only when the whole was verified.
type follower struct {
	f   *fetch
	ctx context.Context
	pos int64
}

func (r *follower) Seek(off int64, whence int) (int64, error) {
	switch whence {
	case io.SeekCurrent:
		off += r.pos
	case io.SeekEnd:
		off += r.f.size
	}
	if off < 0 {
		return 0, fmt.Errorf("seek to %d: before the start of the blob", off)
	}
	r.pos = off
	return off, nil
}

func (r *follower) Read(p []byte) (int, error) {
	if r.pos >= r.f.size {
		return 0, io.EOF
	}
	for {
		r.f.mu.Lock()
		end, over, err, more := r.f.u.Offset(), r.f.over, r.f.err, r.f.more
		r.f.mu.Unlock()
		if over && err != nil {
			return 0, err
		}
		if over {
			end = r.f.size
		}
		if !over {
			end = min(end, r.f.size-1)
		}
		if end > r.pos {
			n, err := r.f.f.ReadAt(p[:min(int64(len(p)), end-r.pos)], r.pos)
			r.pos += int64(n)
			return n, err
		}
		select {
		case <-more:
		case <-r.ctx.Done():
			return 0, context.Cause(r.ctx)
		}
	}
}

// DeleteBlob removes this disk's copy, unless it is owed to the bucket.
func (o *Origin) DeleteBlob(_ context.Context, _ string, d digest.Digest) error {
	if err := o.store.Delete(d); err != nil {
		return wire(err)
	}
	o.swarm.Forget(d)
	o.leases.drop(d)
	return nil
}

// metainfo is the sidecar of a blob on this disk, computed when it is missing.
func (o *Origin) metainfo(ctx context.Context, d digest.Digest) (*blob.Metainfo, error) {
	if m, err := o.store.Metainfo(d); err == nil {
		o.swarm.Register(m)
		return m, nil
	}
	if _, err := o.store.Stat(d); err != nil {
		return nil, wire(err)
	}
	ch := o.hashing.DoChan(d.String(), func() (any, error) {
		m, err := o.store.ComputeMetainfo(o.ctx, d)
		if err == nil {
			o.swarm.Register(m)
		}
		return m, err
	})
	select {
	case r := <-ch:
		if r.Err != nil {
			return nil, wire(r.Err)
		}
		return r.Val.(*blob.Metainfo), nil
	case <-ctx.Done():
		return nil, &registry.RetryError{Err: fmt.Errorf("%w: metainfo of %s is being computed", registry.ErrUnavailable, d), After: time.Second}
	}
}

// findMetainfo answers other roles: this disk, the bucket's copy, else another origin has to be asked.
func (o *Origin) findMetainfo(ctx context.Context, repo string, d digest.Digest) (*blob.Metainfo, error) {
	m, err := o.metainfo(ctx, d)
	if err == nil || !errors.Is(err, registry.ErrBlobUnknown) {
		return m, err
	}
	var unsure []error
	for _, or := range o.others(d) {
		if _, err := or.LocalStat(ctx, repo, d); err == nil {
			// Misplaced, or this owner has lost it: make a copy, then compute.
			if o.origins.Ring().Owns(o.cfg.ID, d) {
				o.background(func(ctx context.Context) { o.copyFrom(ctx, or, repo, d) })
			}
			return nil, &registry.RetryError{Err: fmt.Errorf("%w: blob %s is on its way from %s", registry.ErrUnavailable, d, or.ID), After: time.Second}
		} else if !errors.Is(err, registry.ErrBlobUnknown) {
			unsure = append(unsure, err)
		}
	}
	b, _, err := o.inBucket(ctx, repo, d)
	if err != nil {
		return nil, o.missing(d, unsure, err)
	}
	if _, err := o.readThrough(ctx, repo, d); err != nil {
		return nil, o.missing(d, unsure, err)
	}
	r, err := b.Open(ctx, layout.MetainfoKey(d), 0, -1)
	if err != nil {
		return nil, &registry.RetryError{Err: fmt.Errorf("%w: metainfo of %s: %w", registry.ErrUnavailable, d, err), After: time.Second}
	}
	defer r.Close()
	raw, err := io.ReadAll(io.LimitReader(r, blob.MaxMetainfo+1))
	if err == nil {
		m, err = blob.ParseMetainfo(raw)
	}
	if err != nil || m.Digest != d {
		return nil, &registry.RetryError{Err: fmt.Errorf("%w: metainfo of %s in the bucket is unusable: %w", registry.ErrUnavailable, d, err), After: time.Second}
	}
	return m, nil
}

func isTrue(s string) bool { return strings.EqualFold(s, "true") }
