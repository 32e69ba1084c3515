package origin

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"kraken/origin/bucket"
	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// errLost is the state of a debt whose bytes are nowhere to be found for now.
var errLost = errors.New("owed to the bucket, and its file is lost here")

// recover does what a debt needs whose bytes this disk has lost. Either every bucket that the debt names has the blob,
// so that it is settled, or the bytes come from another origin, and the debt goes on as any other. size is what the
// blob had, or store.SizeUnknown.
func (o *Origin) recover(ctx context.Context, d digest.Digest, m store.Marker, size int64) (settled bool, err error) {
	settled = true
	var errs []error
	for _, target := range m.Targets {
		done, err := o.inBucketAlready(ctx, d, m, target, size)
		settled = settled && done
		if err != nil {
			errs = append(errs, err)
		}
	}
	if settled {
		o.log.Warn("a blob that was owed to the bucket, and whose file was lost here, is in the bucket", "digest", d)
		return true, nil
	}
	for _, or := range o.others(d) {
		err := o.takeFrom(ctx, or, d, m)
		if err == nil {
			o.log.Warn("a blob that is owed to the bucket, and whose file was lost here, came from another origin", "digest", d, "origin", or.ID)
			o.committed(d)
			return false, nil
		}
		errs = append(errs, fmt.Errorf("origin %s: %w", or.ID, err))
	}
	return false, fmt.Errorf("blob %s: %w: %w", d, errLost, errors.Join(errs...))
}

// inBucketAlready settles a debt without bytes at one bucket, if that has the blob.
func (o *Origin) inBucketAlready(ctx context.Context, d digest.Digest, m store.Marker, target string, size int64) (bool, error) {
	b, ok := o.buckets.Get(target)
	if !ok {
		return false, fmt.Errorf("marker of %s names bucket %q, which is not configured", d, target)
	}
	if ok, err := hasVerified(ctx, b, d, size); err != nil || !ok {
		return false, err
	}
	return true, o.paid(ctx, d, m, target, b)
}

// hasVerified says that a bucket has the blob: it is read and hashed, because nothing here can be compared with it.
func hasVerified(ctx context.Context, b bucket.Bucket, d digest.Digest, size int64) (bool, error) {
	obj, err := b.Stat(ctx, layout.BlobKey(d))
	if errors.Is(err, bucket.ErrNotFound) || err == nil && size >= 0 && obj.Size != size {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	r, err := b.Open(ctx, layout.BlobKey(d), 0, -1)
	if err != nil {
		return false, err
	}
	defer r.Close()
	v := d.Verifier()
	if _, err := io.Copy(v, r); err != nil {
		return false, err
	}
	return v.Verified(), nil
}

// takeFrom copies a blob from another origin's disk to this one, with the debt.
func (o *Origin) takeFrom(ctx context.Context, or *cluster.Origin, d digest.Digest, m store.Marker) error {
	if len(m.Repositories) == 0 {
		return fmt.Errorf("marker of %s names no repository", d)
	}
	c, err := or.LocalOpen(ctx, m.Repositories[0], d, registry.Whole)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = o.store.Ingest(ctx, d, c.Size, c.Body, &m)
	return err
}
