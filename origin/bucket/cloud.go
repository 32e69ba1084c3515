package bucket

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"sync/atomic"
	"time"

	"github.com/aws/aws-sdk-go-v2/service/s3"
	"github.com/opencontainers/go-digest"
	"gocloud.dev/blob"
	"gocloud.dev/gcerrors"
)

// cloud is a bucket of the gocloud library: S3 and memory as they are, a folder with more around it.
type cloud struct {
	b    *blob.Bucket
	name string
	// beforeWrite changes the driver's request before an object is written; nil changes nothing.
	beforeWrite func(as func(any) bool) error
	// exists returns ErrMissing where the bucket does not exist; nil in drivers whose buckets always do.
	exists func(context.Context) error
	seen   atomic.Int64 // when it was last seen to exist, in nanoseconds of Unix time
}

// digestKey is the key of an object's metadata that tells its digest, of those that were hashed on their way.
const digestKey = "kraken-digest"

// refused is an error that another try can't change.
type refused struct{ error }

func (r refused) Unwrap() error { return r.error }

// fail says what was tried and turns the library's error into ErrNotFound or ErrUnavailable.
func (b *cloud) fail(what, key string, err error) error {
	if why := complaint(err); why != nil {
		return fmt.Errorf("%s %s in bucket %s: %w: %w: %w", what, key, b.name, ErrUnavailable, why, refused{err})
	}
	switch gcerrors.Code(err) {
	case gcerrors.NotFound:
		return fmt.Errorf("%s %s in bucket %s: %w", what, key, b.name, ErrNotFound)
	case gcerrors.PermissionDenied, gcerrors.InvalidArgument, gcerrors.Unimplemented, gcerrors.FailedPrecondition:
		err = refused{err}
	default:
		if errors.Is(err, ErrContent) {
			err = refused{err}
		}
	}
	return fmt.Errorf("%s %s in bucket %s: %w: %w", what, key, b.name, ErrUnavailable, err)
}

// complaint returns ErrMissing or ErrDenied where err says that of the whole bucket, else nil.
func complaint(err error) error {
	var code interface{ ErrorCode() string }
	if errors.As(err, &code) {
		switch code.ErrorCode() {
		case "NoSuchBucket":
			return ErrMissing
		case "AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "ExpiredToken":
			return ErrDenied
		}
	}
	var status interface{ HTTPStatusCode() int }
	if errors.As(err, &status) && (status.HTTPStatusCode() == http.StatusUnauthorized || status.HTTPStatusCode() == http.StatusForbidden) {
		return ErrDenied
	}
	return nil
}

// seenFor is for how long a bucket that was there is taken to be there when an object is not.
const seenFor = 5 * time.Second

// isThere returns an error that is ErrMissing where the bucket is known not to exist: a HEAD of an object, which has no
// body, is answered by 404 in either case.
func (b *cloud) isThere(ctx context.Context) error {
	if b.exists == nil || time.Since(time.Unix(0, b.seen.Load())) < seenFor {
		return nil
	}
	err := b.exists(ctx)
	if errors.Is(err, ErrMissing) {
		return refused{err}
	}
	if err == nil {
		b.seen.Store(time.Now().UnixNano())
	}
	return nil
}

func (b *cloud) Stat(ctx context.Context, key string) (Object, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	a, err := b.b.Attributes(ctx, key)
	if gcerrors.Code(err) == gcerrors.NotFound {
		if err := b.isThere(ctx); err != nil {
			return Object{}, fmt.Errorf("stat %s in bucket %s: %w: %w", key, b.name, ErrUnavailable, err)
		}
	}
	if err != nil {
		return Object{}, b.fail("stat", key, err)
	}
	b.seen.Store(time.Now().UnixNano())
	return Object{Key: key, Size: a.Size, Digest: digest.Digest(a.Metadata[digestKey])}, nil
}

func (b *cloud) Open(ctx context.Context, key string, off, length int64) (io.ReadCloser, error) {
	r, err := b.b.NewRangeReader(ctx, key, off, length, nil)
	if err != nil {
		return nil, b.fail("read", key, err)
	}
	return r, nil
}

func (b *cloud) Put(ctx context.Context, key string, r io.Reader) error {
	// Cancelling the context is how the library drops what was written so far.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	o := &blob.WriterOptions{ContentType: "application/octet-stream", BeforeWrite: b.beforeWrite}
	if c, ok := r.(*Checked); ok {
		o.Metadata = map[string]string{digestKey: c.Digest().String()}
	}
	w, err := b.b.NewWriter(ctx, key, o)
	if err != nil {
		return b.fail("write", key, err)
	}
	if _, err := io.Copy(w, r); err != nil {
		cancel()
		w.Close() // reports the cancellation
		return b.fail("write", key, err)
	}
	if err := w.Close(); err != nil {
		return b.fail("write", key, err)
	}
	return nil
}

func (b *cloud) Delete(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := b.b.Delete(ctx, key); err != nil && gcerrors.Code(err) != gcerrors.NotFound {
		return b.fail("delete", key, err)
	}
	return nil
}

func (b *cloud) List(ctx context.Context, prefix, after string, fn func(Object) error) error {
	it := b.b.List(&blob.ListOptions{Prefix: prefix, BeforeList: startAfter(after)})
	for {
		o, err := it.Next(ctx)
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return b.fail("list", prefix, err)
		}
		if o.Key <= after {
			continue // the driver can't begin elsewhere than at the first
		}
		if err := fn(Object{Key: o.Key, Size: o.Size}); err != nil {
			return err
		}
	}
}

// startAfter lets S3 begin a listing where it is wanted. Other drivers of the library begin at the first key.
func startAfter(after string) func(as func(any) bool) error {
	if after == "" {
		return nil
	}
	return func(as func(any) bool) error {
		var in *s3.ListObjectsV2Input
		if as(&in) && in.ContinuationToken == nil {
			in.StartAfter = &after
		}
		return nil
	}
}
