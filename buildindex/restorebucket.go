package buildindex

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

const (
	// defaultSweepPart is how many objects of a listing are restored together; up to two such parts are under way.
	defaultSweepPart = 4000
	// sweepAtOnce is how many names are restored at the same time.
	sweepAtOnce = 64
	// changesAtOnce is how many names that need no request share a write.
	changesAtOnce = 200
)

// sweep is how far the restore of one bucket is.
type sweep struct {
	After string `json:"after,omitempty"` // the last key whose name, and those before it, SQL has
	Done  bool   `json:"done,omitempty"`
}

func metaSweep(bucket string) string { return "restore " + bucket }

// loadSweep returns how far an earlier try has come, also one of an earlier process.
func (x *Index) loadSweep(ctx context.Context, name string) (s sweep, err error) {
	v, err := x.db.Meta(ctx, metaSweep(name))
	if err == nil && v != "" {
		err = json.Unmarshal([]byte(v), &s)
	}
	return s, err
}

func setSweep(tx names.Tx, name string, s sweep) error {
	v, err := json.Marshal(s)
	if err != nil {
		return err
	}
	return tx.SetMeta(metaSweep(name), string(v))
}

// found is a part of a listing: what SQL has to learn from it.
type found struct {
	stamps []layout.Stamp // the winning one of each name
	links  []cluster.Name
	last   string // key
}

// add notes an object of the listing.
func (f *found) add(key string) {
	f.last = key
	if s, ok := layout.ParseStamp(key); ok {
		if n := len(f.stamps); n > 0 && f.stamps[n-1].Name == s.Name {
			if s.Wins(f.stamps[n-1].Change) {
				f.stamps[n-1] = s
			}
			return
		}
		f.stamps = append(f.stamps, s)
		return
	}
	switch kind, repo, tag, d := layout.ParseKey(key); kind {
	case layout.KindRevision:
		f.links = append(f.links, cluster.ManifestName(repo, d))
	case layout.KindLayer:
		f.links = append(f.links, cluster.MembershipName(repo, d))
	case layout.KindTagCurrent:
		f.links = append(f.links, cluster.TagName(repo, tag))
	}
}

// sweep reads every name in a bucket, from where an earlier try has stopped. The next part is listed while one is
// restored.
func (x *Index) sweep(ctx context.Context, name string, b bucket.Bucket) error {
	s, err := x.loadSweep(ctx, name)
	if err != nil || s.Done {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	parts, ended := make(chan *found), make(chan error, 1)
	go func() {
		var err error
		for f := range parts {
			if err == nil {
				if err = x.restoreFound(ctx, name, b, f); err != nil {
					cancel(err)
				}
			}
		}
		ended <- err
	}()
	f, n := &found{}, 0
	err = b.List(ctx, layout.RepositoriesRoot, s.After, func(o bucket.Object) error {
		f.add(o.Key)
		if n++; n < x.sweepPart {
			return nil
		}
		parts <- f
		f, n = &found{}, 0
		return context.Cause(ctx)
	})
	if err == nil {
		parts <- f
	}
	close(parts)
	if failed := <-ended; failed != nil {
		err = failed
	}
	if err != nil {
		return fmt.Errorf("restore from bucket %s: %w", name, err)
	}
	return nil
}

// restoreFound restores a part of a listing, manifests before the tags that name them, and notes that it is done.
func (x *Index) restoreFound(ctx context.Context, name string, b bucket.Bucket, f *found) error {
	isTag := func(k cluster.NameKind) bool { return k == cluster.Tag }
	for _, tags := range []bool{false, true} {
		stamps := slices.DeleteFunc(slices.Clone(f.stamps), func(s layout.Stamp) bool { return isTag(s.Kind) != tags })
		if err := x.restoreStamps(ctx, b, stamps); err != nil {
			return err
		}
		g, each := errgroup.WithContext(ctx)
		g.SetLimit(sweepAtOnce)
		for _, n := range f.links {
			if isTag(n.Kind) == tags {
				g.Go(func() error { return x.restoreLink(each, b, n) })
			}
		}
		if err := g.Wait(); err != nil {
			return err
		}
	}
	if f.last == "" {
		return nil
	}
	return x.db.Update(ctx, func(tx names.Tx) error {
		return errors.Join(tx.RaiseGeneration(x.generation.Load()), setSweep(tx, name, sweep{After: f.last}))
	})
}

// restoreStamps writes what stamps say to SQL, where the higher generation wins.
func (x *Index) restoreStamps(ctx context.Context, b bucket.Bucket, stamps []layout.Stamp) error {
	latest := time.Now().Add(cluster.MaxGenerationSkew).UnixMicro()
	g, each := errgroup.WithContext(ctx)
	g.SetLimit(sweepAtOnce)
	var plain []layout.Stamp // that need no request
	for _, s := range stamps {
		switch {
		case s.Generation > latest:
			x.log.Warn("the bucket has a name of a generation that can't be; it counts for nothing", "key", s.Key())
			continue
		case s.Act == cluster.Delete, s.Kind == cluster.Membership:
			plain = append(plain, s)
		case s.Kind == cluster.Manifest:
			g.Go(func() error { return x.restoreManifest(each, b, s.Repository, s.Digest, s.Generation) })
		default:
			g.Go(func() error {
				return x.restoreTag(each, b, s.Repository, s.Tag, names.Version{Digest: s.Target, Generation: s.Generation})
			})
		}
		x.sawGeneration(s.Generation)
	}
	for part := range slices.Chunk(plain, changesAtOnce) {
		g.Go(func() error {
			return x.db.Update(each, func(tx names.Tx) error {
				for _, s := range part {
					if err := x.restorePlain(tx, s); err != nil {
						return err
					}
				}
				return nil
			})
		})
	}
	return g.Wait()
}

// restorePlain writes a deletion or a membership to SQL.
func (x *Index) restorePlain(tx names.Tx, s layout.Stamp) error {
	var err error
	switch {
	case s.Act == cluster.Put:
		err = tx.PutLayer(s.Repository, s.Digest, s.Size, s.Generation)
	case s.Kind == cluster.Membership:
		err = tx.DeleteLayer(s.Repository, s.Digest, s.Generation)
	case s.Kind == cluster.Tag:
		err = tx.DeleteTag(s.Repository, s.Tag, s.Generation)
	default:
		var tags []names.Tagged
		if tags, err = tx.DeleteManifest(s.Repository, s.Digest, s.Generation); err == nil {
			err = x.enqueueTags(tx, s.Repository, tags)
		}
	}
	if errors.Is(err, names.ErrNotFound) || errors.Is(err, names.ErrNewer) {
		return nil
	}
	return err
}

// restoreLink writes to SQL what a link says, unless SQL knows something of the name: a link has no generation, so
// everything else wins over it.
func (x *Index) restoreLink(ctx context.Context, b bucket.Bucket, n cluster.Name) error {
	switch n.Kind {
	case cluster.Tag:
		if _, err := x.db.Tag(ctx, n.Repository, n.Tag); !errors.Is(err, names.ErrNotFound) {
			return err
		}
		v, ok, err := x.linkedTag(ctx, b, n.Repository, n.Tag)
		if err != nil || !ok {
			return err
		}
		return x.restoreTag(ctx, b, n.Repository, n.Tag, v)
	case cluster.Manifest:
		if ok, err := x.hasManifest(ctx, n.Repository, n.Digest); err != nil || ok {
			return err
		}
		if gone, err := x.db.Deleted(ctx, n); err != nil || gone > 0 {
			return err
		}
		return x.restoreManifest(ctx, b, n.Repository, n.Digest, names.NoGeneration)
	}
	if _, err := x.db.Layer(ctx, n.Repository, n.Digest); !errors.Is(err, names.ErrNotFound) {
		return err
	}
	o, err := b.Stat(ctx, layout.BlobKey(n.Digest))
	if errors.Is(err, bucket.ErrNotFound) {
		x.log.Warn("the bucket has a link to a blob that it lacks", "repository", n.Repository, "digest", n.Digest)
		return nil
	}
	if err != nil {
		return err
	}
	err = x.db.Update(ctx, func(tx names.Tx) error { return tx.PutLayer(n.Repository, n.Digest, o.Size, names.NoGeneration) })
	return ignoreNewer(err)
}

func readObject(ctx context.Context, b bucket.Bucket, key string, limit int64) ([]byte, error) {
	r, err := b.Open(ctx, key, 0, -1)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, limit))
}

// restoreManifest reads one manifest. What deletes it later must be of a later generation.
func (x *Index) restoreManifest(ctx context.Context, b bucket.Bucket, repo string, d digest.Digest, generation int64) error {
	var raw, mediaType []byte
	g, each := errgroup.WithContext(ctx)
	g.Go(func() (err error) {
		raw, err = readObject(each, b, layout.BlobKey(d), registry.MaxManifest+1)
		return err
	})
	g.Go(func() (err error) {
		mediaType, err = readObject(each, b, layout.MediaTypeKey(d), 1<<10)
		return ignoreGone(err) // mostly the bytes tell it
	})
	err := g.Wait()
	if errors.Is(err, bucket.ErrNotFound) {
		x.log.Warn("the bucket has a link to a manifest that it lacks", "repository", repo, "digest", d)
		return nil
	}
	if err != nil {
		return err
	}
	if d.Algorithm().FromBytes(raw) != d {
		x.log.Warn("the bucket's bytes of a manifest are wrong", "repository", repo, "digest", d)
		return nil
	}
	m := names.Manifest{Repository: repo, Digest: d, MediaType: strings.TrimSpace(string(mediaType)), Bytes: raw, Generation: generation}
	if m.MediaType == "" {
		m.MediaType = registry.SniffMediaType(raw)
	}
	p, err := parseManifest(m.MediaType, raw)
	if err != nil {
		x.log.Warn("the bucket has a manifest of a kind that is not known", "repository", repo, "digest", d, "error", err)
		return nil
	}
	m.ArtifactType, m.Subject = p.artifactType, p.subject
	return ignoreNewer(x.db.Update(ctx, func(tx names.Tx) error { return tx.PutManifest(m) }))
}

// linkedTag reads a tag that has no stamp: its record if an older version has written one, else its link, which has no
// generation. ok is false when it names nothing.
func (x *Index) linkedTag(ctx context.Context, b bucket.Bucket, repo, tag string) (v names.Version, ok bool, err error) {
	var rec tagRecord
	raw, err := readObject(ctx, b, layout.TagRecordKey(repo, tag), 64<<10)
	switch {
	case err == nil && json.Unmarshal(raw, &rec) == nil:
	case err == nil || errors.Is(err, bucket.ErrNotFound):
		cur, err := readObject(ctx, b, layout.TagCurrentLink(repo, tag), 1<<10)
		if err != nil {
			return v, false, ignoreGone(err)
		}
		rec.Digest, _ = layout.ParseLink(cur)
	default:
		return v, false, err
	}
	if _, err := blob.ParseDigest(rec.Digest.String()); err != nil {
		x.log.Warn("the bucket has a tag that names no digest", "repository", repo, "tag", tag)
		return v, false, nil
	}
	if rec.Generation < 0 || rec.Generation > time.Now().Add(cluster.MaxGenerationSkew).UnixMicro() {
		x.log.Warn("the bucket has a tag of a generation that can't be; it counts as the oldest", "repository", repo, "tag", tag, "generation", rec.Generation)
		rec.Generation = names.NoGeneration
	}
	x.sawGeneration(rec.Generation)
	return names.Version{Digest: rec.Digest, Generation: rec.Generation}, true, nil
}

// restoreTag writes to SQL what a tag names. A tag whose manifest was deleted is a deletion that was not finished: it
// is queued, because the tag would come back with the manifest.
func (x *Index) restoreTag(ctx context.Context, b bucket.Bucket, repo, tag string, v names.Version) error {
	ok, err := x.hasManifest(ctx, repo, v.Digest)
	if err != nil {
		return err
	}
	if !ok {
		gone, err := x.db.Deleted(ctx, cluster.ManifestName(repo, v.Digest))
		switch {
		case err != nil:
			return err
		case gone == 0:
			return nil // the bucket lacks it
		case v.Generation > gone:
			// It was pushed again by a version that gave manifests no generation in the bucket.
			if err := x.restoreManifest(ctx, b, repo, v.Digest, v.Generation); err != nil {
				return err
			}
		default:
			return x.db.Update(ctx, func(tx names.Tx) error {
				err := tx.DeleteTag(repo, tag, v.Generation)
				if errors.Is(err, names.ErrNewer) {
					return nil
				}
				return errors.Join(ignoreMissing(err), x.enqueueTags(tx, repo, []names.Tagged{{Tag: tag, Generation: v.Generation}}))
			})
		}
	}
	return ignoreNewer(x.db.Update(ctx, func(tx names.Tx) error { return tx.PutTag(repo, tag, v) }))
}

// enqueueTags queues the deletion of tags that went with their manifest, of which origins keep no record.
func (x *Index) enqueueTags(tx names.Tx, repo string, tags []names.Tagged) error {
	for _, t := range tags {
		r := cluster.NewRecord(cluster.DeleteName(cluster.TagName(repo, t.Tag)).At(max(t.Generation, 1)), time.Now())
		r.Version = unrecorded
		if err := x.enqueue(tx, r); err != nil {
			return err
		}
	}
	return nil
}

// enqueue adds a change to the outbox of its bucket.
func (x *Index) enqueue(tx names.Tx, r cluster.NameRecord) error {
	return tx.Enqueue(x.bucketOf(r.Repository), r)
}

func ignoreNewer(err error) error {
	if errors.Is(err, names.ErrNewer) {
		return nil
	}
	return err
}

func ignoreGone(err error) error {
	if errors.Is(err, bucket.ErrNotFound) {
		return nil
	}
	return err
}
