package buildindex

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/sql"
	"kraken/origin/backend"
	"kraken/proto/blob"
	"kraken/proto/registry"
)

// metaRestored is set once SQL has everything that the bucket and the origins know.
const metaRestored = "restored"

// restore fills an empty database from the bucket and from the records that origins keep; the highest generation wins. At every
// start it adopts records of the origins that are newer than SQL. It tries until it is done.
func (x *Index) restore(ctx context.Context) error {
	wait := 200 * time.Millisecond
	for {
		err := x.restoreOnce(ctx)
		if err == nil || ctx.Err() != nil {
			return nil
		}
		x.log.Warn("names are not restored yet", "again_in", wait, "error", err)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
		wait = min(2*wait, 5*time.Second)
	}
}

func (x *Index) restoreOnce(ctx context.Context) error {
	began := time.Now()
	fresh := !x.restored.Load()
	dead := map[string]int64{} // tombstones: repository, NUL, tag or digest → generation
	// A record is on as many origins as there are replicas, so one that is missing may be overlooked.
	spare := max(0, x.cfg.Replicas-1)
	var records []registry.NameRecord
	var errs []error
	for _, o := range x.origins.All() {
		err := o.Names(ctx, func(r registry.NameRecord) error {
			records = append(records, r)
			return nil
		})
		if err == nil && fresh {
			err = o.Pending(ctx, func(p registry.PendingBlob) error { return x.adoptPending(ctx, p) })
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("origin %s: %w", o.ID, err))
		}
	}
	if len(errs) > spare {
		return errors.Join(errs...)
	}
	for _, r := range records {
		x.sawGeneration(r.Generation)
		if r.Kind == registry.NameDeleted {
			k := tombKey(r.Repository, nameOf(r))
			dead[k] = max(dead[k], r.Generation)
		}
	}
	if fresh {
		err := x.buckets.All(func(name string, b backend.Bucket) error { return x.fromBucket(ctx, name, b, dead) })
		if err != nil {
			return err
		}
	}
	for _, r := range records {
		if err := x.adopt(ctx, r, dead); err != nil {
			return err
		}
	}
	if fresh {
		if err := x.db.SetMeta(ctx, metaRestored, time.Now().UTC().Format(time.RFC3339)); err != nil {
			return err
		}
		x.restored.Store(true)
		x.log.Info("names are restored", "seconds", time.Since(began).Seconds(), "records", len(records))
	}
	select {
	case x.kick <- struct{}{}:
	default:
	}
	return nil
}

func nameOf(r registry.NameRecord) string {
	switch {
	case r.Tag != "":
		return r.Tag
	case r.Kind == registry.NameLayer || r.MediaType == registry.NameLayer:
		return registry.NameLayer + " " + r.Digest.String()
	}
	return r.Digest.String()
}

func tombKey(repo, name string) string { return repo + "\x00" + name }

func (x *Index) adoptPending(ctx context.Context, p registry.PendingBlob) error {
	for _, repo := range p.Repositories {
		if err := x.putLayer(ctx, repo, registry.Layer{Digest: p.Digest, Size: p.Size}); err != nil {
			return err
		}
	}
	return nil
}

// adopt takes over a record that SQL does not know, and queues it for the bucket.
func (x *Index) adopt(ctx context.Context, r registry.NameRecord, dead map[string]int64) error {
	if r.Kind != registry.NameDeleted && dead[tombKey(r.Repository, nameOf(r))] > r.Generation {
		return nil
	}
	known := false
	switch {
	case r.Kind == registry.NameLayer:
		_, err := x.db.Layer(ctx, r.Repository, r.Digest)
		known = err == nil
	case r.Tag != "":
		_, gen, err := x.db.Tag(ctx, r.Repository, r.Tag)
		known = err == nil && gen >= r.Generation
	case r.Kind == registry.NameManifest:
		ok, err := x.db.HasManifest(ctx, r.Repository, r.Digest)
		if err != nil {
			return err
		}
		known = ok
	}
	if known {
		return nil
	}
	return x.db.Update(ctx, func(tx *sql.Tx) error {
		switch {
		case r.Kind == registry.NameManifest:
			p, err := parseManifest(r.MediaType, r.Bytes)
			if err != nil {
				return nil // from a program that accepts more; it stays on the origins
			}
			if err := x.apply(tx, r, p); err != nil {
				return err
			}
		case r.Kind == registry.NameLayer:
			if err := tx.PutLayer(r.Repository, r.Digest, r.Size); err != nil {
				return err
			}
		case r.Tag != "":
			if err := ignoreMissing(tx.DeleteTag(r.Repository, r.Tag, r.Generation)); err != nil {
				return err
			}
		case r.MediaType == registry.NameLayer:
			if err := ignoreMissing(tx.DeleteLayer(r.Repository, r.Digest)); err != nil {
				return err
			}
		default:
			if _, err := tx.DeleteManifest(r.Repository, r.Digest, r.Generation); ignoreMissing(err) != nil {
				return err
			}
		}
		return tx.Enqueue(r)
	})
}

// fromBucket reads every name in a bucket: first what is there, then the tags, which need the manifests.
func (x *Index) fromBucket(ctx context.Context, name string, b backend.Bucket, dead map[string]int64) error {
	type tag struct{ repo, tag string }
	var tags []tag
	err := b.List(ctx, backend.RepositoriesRoot, func(o backend.Object) error {
		kind, repo, t, d := backend.ParseKey(o.Key)
		switch kind {
		case backend.KindRevision:
			return x.restoreManifest(ctx, b, repo, d, dead)
		case backend.KindLayer:
			return x.restoreLayer(ctx, b, repo, d, dead)
		case backend.KindTagCurrent:
			tags = append(tags, tag{repo, t})
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("restore from bucket %s: %w", name, err)
	}
	for _, t := range tags {
		if err := x.restoreTag(ctx, b, t.repo, t.tag, dead); err != nil {
			return fmt.Errorf("restore from bucket %s: %w", name, err)
		}
	}
	return nil
}

func read(ctx context.Context, b backend.Bucket, key string, limit int64) ([]byte, error) {
	r, err := b.Open(ctx, key, 0, -1)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, limit))
}

func (x *Index) restoreManifest(ctx context.Context, b backend.Bucket, repo string, d digest.Digest, dead map[string]int64) error {
	if dead[tombKey(repo, d.String())] > 0 {
		return nil
	}
	raw, err := read(ctx, b, backend.BlobKey(d), registry.MaxManifest+1)
	if errors.Is(err, backend.ErrNotFound) {
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
	mediaType := registry.SniffMediaType(raw)
	if mt, err := read(ctx, b, backend.MediaTypeKey(d), 1<<10); err == nil {
		mediaType = strings.TrimSpace(string(mt))
	} else if !errors.Is(err, backend.ErrNotFound) {
		return err
	}
	p, err := parseManifest(mediaType, raw)
	if err != nil {
		x.log.Warn("the bucket has a manifest of a kind that is not known", "repository", repo, "digest", d, "error", err)
		return nil
	}
	return x.db.Update(ctx, func(tx *sql.Tx) error {
		return tx.PutManifest(sql.Manifest{
			Repository: repo, Digest: d, MediaType: mediaType, ArtifactType: p.artifactType, Subject: p.subject, Bytes: raw,
		})
	})
}

func (x *Index) restoreLayer(ctx context.Context, b backend.Bucket, repo string, d digest.Digest, dead map[string]int64) error {
	if dead[tombKey(repo, registry.NameLayer+" "+d.String())] > 0 {
		return nil
	}
	o, err := b.Stat(ctx, backend.BlobKey(d))
	if errors.Is(err, backend.ErrNotFound) {
		x.log.Warn("the bucket has a link to a blob that it lacks", "repository", repo, "digest", d)
		return nil
	}
	if err != nil {
		return err
	}
	return x.putLayer(ctx, repo, registry.Layer{Digest: d, Size: o.Size})
}

func (x *Index) restoreTag(ctx context.Context, b backend.Bucket, repo, tag string, dead map[string]int64) error {
	var rec tagRecord
	raw, err := read(ctx, b, backend.TagRecordKey(repo, tag), 64<<10)
	switch {
	case err == nil && json.Unmarshal(raw, &rec) == nil:
	case err == nil || errors.Is(err, backend.ErrNotFound):
		// Written by another registry: no generation, so whatever is known elsewhere wins.
		cur, err := read(ctx, b, backend.TagCurrentLink(repo, tag), 1<<10)
		if err != nil {
			return ignoreGone(err)
		}
		rec.Digest = digest.Digest(strings.TrimSpace(string(cur)))
	default:
		return err
	}
	if _, err := blob.ParseDigest(rec.Digest.String()); err != nil {
		x.log.Warn("the bucket has a tag that names no digest", "repository", repo, "tag", tag)
		return nil
	}
	x.sawGeneration(rec.Generation)
	ok, err := x.db.HasManifest(ctx, repo, rec.Digest)
	if err != nil || !ok || dead[tombKey(repo, tag)] > rec.Generation {
		return err
	}
	return x.db.Update(ctx, func(tx *sql.Tx) error { return tx.PutTag(repo, tag, rec.Digest, rec.Generation) })
}

func ignoreGone(err error) error {
	if errors.Is(err, backend.ErrNotFound) {
		return nil
	}
	return err
}
