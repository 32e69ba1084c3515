package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
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
