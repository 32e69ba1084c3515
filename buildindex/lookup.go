package buildindex

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// While names are being restored SQL is not yet what counts. A name that is asked for meanwhile is looked up in the
// bucket and written to SQL first, so that its answer is as true as later. That needs that the records of the origins
// were heard in this run, because they are newer than the bucket.

// heardWait is how long a request waits for the origins to be heard after a start.
const heardWait = time.Second

// maxLookedUp bounds the memory of names that were looked up. What is forgotten is looked up once more.
const maxLookedUp = 1 << 16

// lookups are the names of which SQL has what the bucket has, or something newer, although the restore is not done.
type lookups struct {
	mu   sync.Mutex
	done map[cluster.Name]bool
	busy map[cluster.Name]*lookup
}

// know notes what this process has written: no bucket has anything newer.
func (l *lookups) know(r cluster.NameRecord) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range r.Changes() {
		l.mark(c.Name)
	}
}

// mark notes that SQL has what there is of a name. The caller holds l.mu.
func (l *lookups) mark(n cluster.Name) {
	if l.done == nil || len(l.done) >= maxLookedUp {
		l.done = map[cluster.Name]bool{}
	}
	l.done[n] = true
}

type lookup struct {
	done chan struct{}
	err  error
}

// complete reports whether SQL has all names of a repository.
func (x *Index) complete(repo string) bool {
	return x.restored.Load() && x.heard() || x.swept(x.bucketOf(repo))
}

// heard reports whether enough origins were heard since the start.
func (x *Index) heard() bool {
	select {
	case <-x.heardOrigins:
		return true
	default:
		return false
	}
}

// awaitHeard waits a moment for the origins to be heard, ErrUnavailable when they are not.
func (x *Index) awaitHeard(ctx context.Context, what string) error {
	t := time.NewTimer(heardWait)
	defer t.Stop()
	select {
	case <-x.heardOrigins:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-t.C:
		return x.notYet(what)
	}
}

// notYet is the answer for what SQL does not know yet.
func (x *Index) notYet(what string) error {
	return isAway(fmt.Errorf("%s: names are being restored", what))
}

// read returns what SQL says of a name, after the bucket was asked where SQL does not know. names.ErrNotFound is a
// clear no; ErrUnavailable, that it is not known now.
func read[T any](ctx context.Context, x *Index, n cluster.Name, sql func() (T, error)) (v T, err error) {
	what := n.String()
	if at := x.unproven.laterAt(n); at > 0 {
		// What was written since that record was looked at is later.
		if now, err := x.changedAt(ctx, n); err != nil {
			return v, err
		} else if now < at {
			return v, x.notYet(what)
		}
	}
	if x.complete(n.Repository) {
		return sql()
	}
	if x.stale.Load() || x.restored.Load() { // what SQL has may be old
		if err := x.awaitHeard(ctx, what); err != nil {
			return v, err
		}
	}
	if !x.stale.Load() && !x.unproven.has(n) {
		if v, err = sql(); !errors.Is(err, names.ErrNotFound) || x.complete(n.Repository) {
			return v, err
		}
	}
	if !x.heard() {
		return v, x.notYet(what)
	}
	if err := x.lookUp(ctx, n); err != nil {
		return v, isAway(fmt.Errorf("%s: names are being restored: %w", what, err))
	}
	return sql()
}

// lookUp makes SQL know what the bucket has of a name. Those who ask for one name at once share the requests.
func (x *Index) lookUp(ctx context.Context, n cluster.Name) error {
	_, b, ok := x.buckets.For(n.Repository)
	if !ok {
		return nil // nothing can be there
	}
	l := &x.lookups
	l.mu.Lock()
	if l.done[n] {
		l.mu.Unlock()
		return nil
	}
	c, shared := l.busy[n]
	if !shared {
		c = &lookup{done: make(chan struct{})}
		if l.busy == nil {
			l.busy = map[cluster.Name]*lookup{}
		}
		l.busy[n] = c
	}
	l.mu.Unlock()
	if shared {
		select {
		case <-c.done:
			return c.err
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lookupTimeout)
	defer cancel()
	c.err = x.restoreName(ctx, b, n)
	l.mu.Lock()
	defer l.mu.Unlock()
	delete(l.busy, n)
	if c.err == nil {
		l.mark(n)
	}
	close(c.done)
	return c.err
}

const lookupTimeout = 10 * time.Second

// restoreName writes to SQL what a bucket has of one name: of a tag also its manifest.
func (x *Index) restoreName(ctx context.Context, b bucket.Bucket, n cluster.Name) error {
	top, _, err := stampsOf(ctx, b, n)
	if err != nil {
		return err
	}
	if top.Generation > 0 {
		if top.Kind == cluster.Tag && top.Act == cluster.Put {
			if err := x.lookUp(ctx, cluster.ManifestName(n.Repository, top.Target)); err != nil {
				return err
			}
		}
		return x.restoreStamps(ctx, b, []layout.Stamp{top})
	}
	var key string
	switch n.Kind {
	case cluster.Tag:
		v, ok, err := x.linkedTag(ctx, b, n.Repository, n.Tag)
		if err != nil || !ok {
			return err
		}
		if err := x.lookUp(ctx, cluster.ManifestName(n.Repository, v.Digest)); err != nil {
			return err
		}
		return x.restoreTag(ctx, b, n.Repository, n.Tag, v)
	case cluster.Manifest:
		key = layout.RevisionLink(n.Repository, n.Digest)
	default:
		key = layout.LayerLink(n.Repository, n.Digest)
	}
	if _, err := b.Stat(ctx, key); err != nil {
		return ignoreGone(err)
	}
	return x.restoreLink(ctx, b, n)
}

// tag returns what a tag names.
func (x *Index) tag(ctx context.Context, repo, tag string) (names.Version, error) {
	return read(ctx, x, cluster.TagName(repo, tag), func() (names.Version, error) { return x.db.Tag(ctx, repo, tag) })
}

// layer returns a membership.
func (x *Index) layer(ctx context.Context, repo string, d digest.Digest) (names.Layer, error) {
	return read(ctx, x, cluster.MembershipName(repo, d), func() (names.Layer, error) { return x.db.Layer(ctx, repo, d) })
}

// manifest returns the manifest of a tag or a digest.
func (x *Index) manifest(ctx context.Context, repo string, ref registry.Reference) (names.Manifest, error) {
	n := cluster.ManifestName(repo, ref.Digest)
	if ref.Tag != "" {
		n = cluster.TagName(repo, ref.Tag)
	}
	return read(ctx, x, n, func() (names.Manifest, error) { return x.db.Manifest(ctx, repo, ref) })
}

// stat returns a manifest without its bytes.
func (x *Index) stat(ctx context.Context, repo string, d digest.Digest) (names.Manifest, error) {
	return read(ctx, x, cluster.ManifestName(repo, d), func() (names.Manifest, error) { return x.db.StatManifest(ctx, repo, d) })
}
