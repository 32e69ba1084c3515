package origin

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/google/uuid"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/origin/store"
	"kraken/proto/registry"
)

// marker is what a blob that was pushed to repo owes the bucket.
func (o *Origin) marker(repo string) (store.Marker, error) {
	name, _, ok := o.buckets.For(repo)
	if !ok {
		return store.Marker{}, fmt.Errorf("%w: no bucket is configured for repository %s", registry.ErrDenied, repo)
	}
	return store.Marker{Targets: []string{name}, Repositories: []string{repo}, Created: time.Now().UTC()}, nil
}

// StartUpload opens a session on this origin's disk.
func (o *Origin) StartUpload(_ context.Context, repo string, opt registry.UploadOptions) (registry.Upload, error) {
	if _, err := o.marker(repo); err != nil {
		return registry.Upload{}, err
	}
	u, err := o.store.NewUpload(store.UploadOptions{ID: uuid.NewString(), Size: opt.Size, Digest: opt.Digest, Note: repo, Source: opt.Source})
	if err != nil {
		return registry.Upload{}, wire(err)
	}
	return registry.Upload{ID: u.ID()}, nil
}

// session returns the session that a client began here for repo. The store has others, of blobs that come from the
// bucket or another origin: only a UUID, as StartUpload makes them, names one that may be written to.
func (o *Origin) session(repo, id string) (*store.Upload, error) {
	if u, err := uuid.Parse(id); err != nil || u.String() != id {
		return nil, fmt.Errorf("%w: %.64q is no UUID", registry.ErrBlobUploadUnknown, id)
	}
	u, err := o.store.Upload(id)
	if err != nil {
		return nil, wire(err)
	}
	if u.Note() != repo {
		return nil, fmt.Errorf("%w: %.64q is no session of %s", registry.ErrBlobUploadUnknown, id, repo)
	}
	return u, nil
}

// UploadStatus says how far a session is.
func (o *Origin) UploadStatus(_ context.Context, repo, id string) (registry.Upload, error) {
	u, err := o.session(repo, id)
	if err != nil {
		return registry.Upload{}, err
	}
	u.Resync()
	return registry.Upload{ID: id, Offset: u.Offset()}, nil
}

// WriteUpload appends a chunk.
func (o *Origin) WriteUpload(ctx context.Context, repo, id string, c registry.Chunk) (registry.Upload, error) {
	u, err := o.session(repo, id)
	if err != nil {
		return registry.Upload{}, err
	}
	if err := o.write(ctx, u, c, u.Write); err != nil {
		return registry.Upload{}, err
	}
	return registry.Upload{ID: id, Offset: u.Offset()}, nil
}

// write hands a chunk to one of the two ways in which a session takes it.
func (o *Origin) write(ctx context.Context, u *store.Upload, c registry.Chunk, write func(context.Context, int64, io.Reader) (int64, error)) error {
	if c.Body == nil {
		return nil
	}
	n, err := write(ctx, c.Offset, c.Body)
	o.m.received.Add(float64(n))
	if err == nil && c.Length >= 0 && n != c.Length {
		err = fmt.Errorf("%w: chunk has %d bytes, %d were announced", registry.ErrSizeInvalid, n, c.Length)
	}
	var oe *store.OffsetError
	if errors.As(err, &oe) {
		return &registry.RangeError{Upload: registry.Upload{ID: u.ID(), Offset: oe.Want}, Got: oe.Got}
	}
	return wire(err)
}

// CommitUpload verifies the session and makes it a blob that is marked for write-back, durably. It may be repeated:
// what the session was committed as is answered again, and a body that was cut may be sent again from its first byte.
func (o *Origin) CommitUpload(ctx context.Context, repo, id string, d digest.Digest, c registry.Chunk) (v1.Descriptor, error) {
	desc, err := o.commit(ctx, repo, id, d, c)
	if !errors.Is(err, registry.ErrBlobUploadUnknown) {
		return desc, err
	}
	again, aerr := o.commits.again(repo, id, d)
	if aerr != nil {
		return v1.Descriptor{}, err
	}
	if _, serr := o.store.Stat(d); serr != nil {
		return v1.Descriptor{}, err // it is gone here, and has to be sent anew
	}
	if c.Body != nil {
		// Who sends it again expects it to be read; how it is cut or what it is does not matter any more.
		_, _ = io.CopyN(io.Discard, c.Body, again.Size)
	}
	return again, nil
}

// commitWait is how long a commit waits for an earlier request to the same session, whose end may not have been noticed
// yet.
const commitWait = 2 * time.Second

func (o *Origin) commit(ctx context.Context, repo, id string, d digest.Digest, c registry.Chunk) (v1.Descriptor, error) {
	u, err := o.session(repo, id)
	if err != nil {
		return v1.Descriptor{}, err
	}
	m, err := o.marker(repo)
	if err != nil {
		return v1.Descriptor{}, err
	}
	if err := u.AwaitIdle(ctx, commitWait); err != nil {
		return v1.Descriptor{}, wire(err)
	}
	write := u.Write
	if c.Offset < 0 {
		write = func(ctx context.Context, _ int64, r io.Reader) (int64, error) { return u.WriteLast(ctx, r) }
	}
	if err := o.write(ctx, u, c, write); err != nil {
		return v1.Descriptor{}, err
	}
	// The client may go away now; what has arrived whole is kept.
	i, err := u.Commit(context.WithoutCancel(ctx), d, &m)
	if err != nil {
		return v1.Descriptor{}, wire(err)
	}
	desc := v1.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: i.Size}
	o.commits.add(id, repo, desc)
	o.committed(d)
	return desc, nil
}

// committed starts what follows a commit in the background: metainfo, write-back, and the way to the owners.
func (o *Origin) committed(d digest.Digest) {
	o.Background(func(ctx context.Context) {
		if _, err := o.metainfo(ctx, d); err != nil && ctx.Err() == nil {
			o.log.Warn("metainfo was not computed", "digest", d, "error", err)
		}
	})
	o.wake()
}

// AbortUpload removes a session.
func (o *Origin) AbortUpload(_ context.Context, repo, id string) error {
	u, err := o.session(repo, id)
	if err != nil {
		return err
	}
	return wire(u.Abort())
}
