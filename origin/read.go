package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/origin/bucket"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// hashedOnRead is the size in bytes up to which a blob is hashed each time that all of it is read: larger ones are
// verified when somebody says that they are wrong, and by the scrub.
const hashedOnRead = 1 << 20

// localWhole is local for who reads the whole blob: a small one is verified first.
func (o *Origin) localWhole(ctx context.Context, d digest.Digest) (*registry.Content, error) {
	if i, err := o.store.Stat(d); err != nil || i.Size > hashedOnRead {
		return o.local(d)
	}
	r, err := o.store.OpenVerified(ctx, d)
	if err != nil {
		return nil, wire(err)
	}
	return &registry.Content{Digest: d, Size: r.Info().Size, File: r.File(), Close: r.Close}, nil
}

// local opens what is on this disk.
func (o *Origin) local(d digest.Digest) (*registry.Content, error) {
	r, err := o.store.Open(d)
	if err != nil {
		return nil, wire(err)
	}
	return &registry.Content{Digest: d, Size: r.Info().Size, File: r.File(), Close: r.Close}, nil
}

// StatBlob asks this disk, the other origins' disks, the bucket and the upstream, in this order, and moves no bytes.
func (o *Origin) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	if i, err := o.store.Stat(d); err == nil {
		return v1.Descriptor{Digest: d, Size: i.Size}, nil
	}
	if f := o.inFlight(ctx, repo, d); f != nil {
		return v1.Descriptor{Digest: d, Size: f.size}, nil
	}
	or, desc, unsure := o.elsewhere(ctx, repo, d)
	if or != nil {
		return desc, nil
	}
	up, isUpstream := o.upstreamOf(ctx, repo)
	if isUpstream && !up.registry.WriteBack {
		desc, err := o.statUpstream(ctx, up, d)
		return desc, o.unlessUnsure(d, unsure, err)
	}
	_, obj, err := o.inBucket(ctx, repo, d)
	if err == nil {
		return v1.Descriptor{Digest: d, Size: obj.Size}, nil
	}
	if isUpstream {
		if !errors.Is(err, bucket.ErrNotFound) {
			unsure = append(unsure, err)
		}
		desc, err := o.statUpstream(ctx, up, d)
		return desc, o.unlessUnsure(d, unsure, err)
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

// unlessUnsure returns what an upstream said, which is 404 only when nobody else may have the blob.
func (o *Origin) unlessUnsure(d digest.Digest, unsure []error, err error) error {
	if len(unsure) > 0 && errors.Is(err, registry.ErrBlobUnknown) {
		return o.missing(d, unsure, bucket.ErrNotFound)
	}
	return err
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

// besideUpstream returns nil when the bucket has a blob of an upstream's repository, bucket.ErrNotFound when it has
// not, also because none of the repository's are written back there.
func (o *Origin) besideUpstream(ctx context.Context, up mirrored, repo string, d digest.Digest) error {
	if !up.registry.WriteBack {
		return bucket.ErrNotFound
	}
	_, _, err := o.inBucket(ctx, repo, d)
	return err
}

// OpenBlob reads from this disk, from another origin's, or through from the bucket, or the repository's
// upstream, while the bytes come to a disk.
func (o *Origin) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	here := o.localWhole
	if hint != registry.Whole {
		here = func(_ context.Context, d digest.Digest) (*registry.Content, error) { return o.local(d) }
	}
	if c, err := here(ctx, d); err == nil {
		return c, nil
	}
	if f := o.inFlight(ctx, repo, d); f != nil {
		return f.open(ctx)
	}
	c, or, unsure := o.openElsewhere(ctx, repo, d, hint)
	if c != nil {
		if o.origins.Ring().Owns(o.cfg.ID, d) {
			o.Background(func(ctx context.Context) { o.copyFrom(ctx, or, repo, d) })
		}
		return c, nil
	}
	if up, isUpstream := o.upstreamOf(ctx, repo); isUpstream {
		return o.through(ctx, up, repo, d, hint)
	}
	f, err := o.readThrough(ctx, repo, d)
	if err != nil {
		return nil, o.missing(d, unsure, err)
	}
	return f.open(ctx)
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
