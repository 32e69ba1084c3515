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

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// fromBucket reads every name in a bucket: first what is there, then the tags, which need the manifests.
func (x *Index) fromBucket(ctx context.Context, name string, b bucket.Bucket, dead cluster.Latest) error {
	type tag struct{ repo, tag string }
	var tags []tag
	err := b.List(ctx, layout.RepositoriesRoot, func(o bucket.Object) error {
		kind, repo, t, d := layout.ParseKey(o.Key)
		switch kind {
		case layout.KindRevision:
			if dead.Has(cluster.ManifestName(repo, d)) {
				return nil // unless a tag was pushed since: restoreTag
			}
			return x.restoreManifest(ctx, b, repo, d, names.NoGeneration)
		case layout.KindLayer:
			return x.restoreLayer(ctx, b, repo, d, dead)
		case layout.KindTagCurrent:
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

func read(ctx context.Context, b bucket.Bucket, key string, limit int64) ([]byte, error) {
	r, err := b.Open(ctx, key, 0, -1)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(io.LimitReader(r, limit))
}

// restoreManifest reads one manifest. What deletes it later must be of a later generation.
func (x *Index) restoreManifest(ctx context.Context, b bucket.Bucket, repo string, d digest.Digest, generation int64) error {
	raw, err := read(ctx, b, layout.BlobKey(d), registry.MaxManifest+1)
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
	mediaType := registry.SniffMediaType(raw)
	if mt, err := read(ctx, b, layout.MediaTypeKey(d), 1<<10); err == nil {
		mediaType = strings.TrimSpace(string(mt))
	} else if !errors.Is(err, bucket.ErrNotFound) {
		return err
	}
	p, err := parseManifest(mediaType, raw)
	if err != nil {
		x.log.Warn("the bucket has a manifest of a kind that is not known", "repository", repo, "digest", d, "error", err)
		return nil
	}
	err = x.db.Update(ctx, func(tx names.Tx) error {
		return tx.PutManifest(names.Manifest{
			Repository: repo, Digest: d, MediaType: mediaType, ArtifactType: p.artifactType, Subject: p.subject, Bytes: raw,
			Generation: generation,
		})
	})
	if errors.Is(err, names.ErrNewer) {
		return nil // deleted meanwhile
	}
	return err
}

func (x *Index) restoreLayer(ctx context.Context, b bucket.Bucket, repo string, d digest.Digest, dead cluster.Latest) error {
	if dead.Has(cluster.MembershipName(repo, d)) {
		return nil
	}
	o, err := b.Stat(ctx, layout.BlobKey(d))
	if errors.Is(err, bucket.ErrNotFound) {
		x.log.Warn("the bucket has a link to a blob that it lacks", "repository", repo, "digest", d)
		return nil
	}
	if err != nil {
		return err
	}
	return x.putLayer(ctx, repo, cluster.Layer{Digest: d, Size: o.Size})
}

func (x *Index) restoreTag(ctx context.Context, b bucket.Bucket, repo, tag string, dead cluster.Latest) error {
	var rec tagRecord
	raw, err := read(ctx, b, layout.TagRecordKey(repo, tag), 64<<10)
	switch {
	case err == nil && json.Unmarshal(raw, &rec) == nil:
	case err == nil || errors.Is(err, bucket.ErrNotFound):
		// Written by another registry: no generation, so whatever is known elsewhere wins.
		cur, err := read(ctx, b, layout.TagCurrentLink(repo, tag), 1<<10)
		if err != nil {
			return ignoreGone(err)
		}
		if rec.Digest, err = layout.ParseLink(cur); err != nil {
			x.log.Warn("the bucket has a tag that names no digest", "repository", repo, "tag", tag, "error", err)
			return nil
		}
	default:
		return err
	}
	if _, err := blob.ParseDigest(rec.Digest.String()); err != nil {
		x.log.Warn("the bucket has a tag that names no digest", "repository", repo, "tag", tag)
		return nil
	}
	if rec.Generation < 0 || rec.Generation > time.Now().Add(cluster.MaxGenerationSkew).UnixMicro() {
		x.log.Warn("the bucket has a tag of a generation that can't be; it counts as the oldest", "repository", repo, "tag", tag, "generation", rec.Generation)
		rec.Generation = 0
	}
	x.sawGeneration(rec.Generation)
	put := cluster.PutName(cluster.ManifestName(repo, rec.Digest)).At(rec.Generation)
	if dead.Has(put.Name) && !dead.Beats(put) {
		// It was pushed again after its deletion, whose record came back: from an origin that was away, say.
		if err := x.restoreManifest(ctx, b, repo, rec.Digest, rec.Generation); err != nil {
			return err
		}
	}
	ok, err := x.hasManifest(ctx, repo, rec.Digest)
	if err != nil || !ok || dead.Beats(cluster.PutTag(repo, tag, rec.Digest).At(rec.Generation)) {
		return err
	}
	return x.db.Update(ctx, func(tx names.Tx) error {
		if err := tx.PutTag(repo, tag, names.Version{Digest: rec.Digest, Generation: rec.Generation}); !errors.Is(err, names.ErrNewer) {
			return err
		}
		return nil // pushed meanwhile
	})
}

func ignoreGone(err error) error {
	if errors.Is(err, bucket.ErrNotFound) {
		return nil
	}
	return err
}
