package proxy

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// StatBlob goes by membership, and asks the origins whether the bytes are there as well: a client that is told so skips
// its push, and a blob that was lost must be healed by the next push.
func (p *Proxy) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	// One after the other: most questions are about new blobs, for which an origin would look everywhere, the bucket
	// included, for nothing.
	l, err := p.index.GetLayer(ctx, repo, d)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("blob %s of %s: %w", d, repo, err)
	}
	desc, err := p.origins.StatBlob(ctx, repo, d)
	if errors.Is(err, registry.ErrBlobUnknown) {
		return v1.Descriptor{}, fmt.Errorf("blob %s of %s is a member, but no origin has it: %w", d, repo, err)
	}
	return v1.Descriptor{MediaType: desc.MediaType, Digest: d, Size: l.Size}, nil
}

// OpenBlob reads from an owning origin what is a member of the repository.
func (p *Proxy) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	l, err := p.index.GetLayer(ctx, repo, d)
	if err != nil {
		return nil, fmt.Errorf("blob %s of %s: %w", d, repo, err)
	}
	c, err := openWithin(ctx, max(p.originPatience, p.stall), d, func(ctx context.Context) (*registry.Content, error) {
		c, err := transport.AskAgain(ctx, p.originPatience, isAway, func() (*registry.Content, error) { return p.origins.OpenBlob(ctx, repo, d, hint) })
		if err == nil && c.Size != l.Size {
			c.Close()
			c, err = p.openElsewhere(ctx, repo, d, hint, l.Size)
		}
		return c, err
	})
	if err != nil {
		return nil, err
	}
	return p.watch(ctx, repo, c), nil
}

// errLate is that no origin gave a blob in the time that a read waits for one.
var errLate = errors.New("no origin gave it in time")

// openWithin returns the blob that open opens, ErrUnavailable when it has not done so within patience, for which its
// context lasts. That of a blob that was opened lasts as long as ctx.
func openWithin(ctx context.Context, patience time.Duration, d digest.Digest, open func(context.Context) (*registry.Content, error)) (*registry.Content, error) {
	within, cancel := context.WithCancelCause(ctx)
	t := time.AfterFunc(patience, func() { cancel(errLate) })
	c, err := open(within)
	if !t.Stop() && err == nil {
		err = errors.Join(context.Cause(within), c.Close())
	}
	if err == nil {
		closed := c.Close
		c.Close = func() error {
			defer cancel(nil)
			return closed()
		}
		return c, nil
	}
	defer cancel(nil)
	if context.Cause(within) == errLate {
		err = &registry.RetryError{Err: fmt.Errorf("%w: blob %s: %w: %w", registry.ErrUnavailable, d, errLate, err), After: time.Second}
	}
	return nil, err
}

// isAway reports whether whoever has the bytes can't be reached: origins that restart, or the bucket where it alone has
// them.
func isAway(err error) bool { return errors.Is(err, registry.ErrUnavailable) }

// DeleteBlob ends the membership; the bytes go later, when no repository has them any more.
func (p *Proxy) DeleteBlob(ctx context.Context, repo string, d digest.Digest) error {
	if err := p.index.DeleteLayer(ctx, repo, d); err != nil {
		return fmt.Errorf("delete blob %s of %s: %w", d, repo, err)
	}
	return nil
}

// MountBlob makes the blob of another repository a member of this one; no byte moves. Where access is controlled the
// caller must be able to pull from one that has it, and is told of no other.
func (p *Proxy) MountBlob(ctx context.Context, repo, from string, d digest.Digest) (v1.Descriptor, error) {
	if err := p.namer.CheckPush(repo); err != nil {
		return v1.Descriptor{}, err
	}
	if registry.Controlled(ctx) {
		if err := p.readable(ctx, from, d); err != nil {
			return v1.Descriptor{}, fmt.Errorf("mount blob %s of %q into %s: %w", d, from, repo, err)
		}
	}
	l, err := p.index.MountLayer(ctx, repo, from, d)
	if err != nil {
		return v1.Descriptor{}, fmt.Errorf("mount blob %s of %q into %s: %w", d, from, repo, err)
	}
	return v1.Descriptor{MediaType: "application/octet-stream", Digest: d, Size: l.Size}, nil
}

// readable returns nil when the caller may pull a blob from the repository from, or from some other that has it, and
// ErrBlobUnknown when there is none: whether others have it is not told.
func (p *Proxy) readable(ctx context.Context, from string, d digest.Digest) error {
	mayPull := func(repo string) bool {
		// Who may read what is private its upstream says, and of credentials for that a proxy takes none.
		return !p.namer.MayBePrivate(repo) && registry.May(ctx, repo, registry.ActionPull)
	}
	if from != "" && mayPull(from) { // a hint, which may be wrong
		if _, err := p.index.GetLayer(ctx, from, d); !errors.Is(err, registry.ErrBlobUnknown) {
			return err
		}
	}
	for last, n := "", 0; n < maxMountSources; {
		page, err := p.index.BlobRepositories(ctx, d, last, cluster.MaxMembers)
		if err != nil || len(page) == 0 {
			return cmp.Or(err, error(registry.ErrBlobUnknown))
		}
		for _, repo := range page {
			if mayPull(repo) {
				return nil
			}
		}
		last, n = page[len(page)-1], n+len(page)
	}
	return registry.ErrBlobUnknown
}

// maxMountSources bounds the repositories that are looked at for one mount without a source.
const maxMountSources = 10 * cluster.MaxMembers
