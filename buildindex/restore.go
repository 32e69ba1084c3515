package buildindex

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/sql"
	"kraken/origin/bucket"
	"kraken/proto/blob"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

const (
	metaRestored = "restored" // set once SQL has what the bucket and enough origins know
	metaUnheard  = "unheard"  // the origins, a JSON list of ids, that could not be asked at that time
)

const (
	reconcileEvery = time.Minute
	restoreMax     = 5 * time.Second // between tries of a restoration
	// settled is the age from which a record belongs to no change that is still under way.
	settled = time.Minute
)

// restore fills an empty database from the bucket and from the records that origins keep, then compares SQL with these records now and
// then, until ctx is done.
func (x *Index) restore(ctx context.Context) error {
	began := time.Now()
	wait := 200 * time.Millisecond
	for {
		var err error
		next := reconcileEvery
		if x.restored.Load() {
			err = x.reconcile(ctx, began)
		} else if err = x.fill(ctx); err != nil {
			next = wait
			wait = min(2*wait, restoreMax)
		} else {
			next = 0 // origins that were not heard
		}
		if err != nil && ctx.Err() == nil {
			x.log.Warn("not all names that origins keep are known", "restored", x.restored.Load(), "again_in", next, "error", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(next):
		}
	}
}

// fill restores. The bucket and all but replicas - 1 origins must be heard: a record is on as many origins as there are replicas.
func (x *Index) fill(ctx context.Context) error {
	began := time.Now()
	var records []registry.NameRecord
	var errs []error
	var unheard []string
	for _, o := range x.origins.All() {
		mine, err := x.recordsOf(ctx, o)
		if err == nil {
			err = x.adoptPending(ctx, o)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("origin %s: %w", o.ID, err))
			unheard = append(unheard, o.ID)
			continue
		}
		records = append(records, mine...)
	}
	if len(errs) > max(0, x.cfg.Replicas-1) {
		return errors.Join(errs...)
	}
	dead := tombstones(records)
	err := x.buckets.All(func(name string, b bucket.Bucket) error { return x.fromBucket(ctx, name, b, dead) })
	if err != nil {
		return err
	}
	if err := x.adoptAll(ctx, records, dead); err != nil {
		return err
	}
	err = x.db.Update(ctx, func(tx *sql.Tx) error {
		return errors.Join(tx.RaiseGeneration(x.generation.Load()), setUnheard(tx, unheard), tx.SetMeta(metaRestored, time.Now().UTC().Format(time.RFC3339)))
	})
	if err != nil {
		return err
	}
	x.restored.Store(true)
	x.log.Info("names are restored", "seconds", time.Since(began).Seconds(), "records", len(records), "origins_not_heard", unheard)
	return nil
}

func setUnheard(tx *sql.Tx, ids []string) error {
	b, err := json.Marshal(ids)
	if err != nil {
		return err
	}
	return tx.SetMeta(metaUnheard, string(b))
}

// reconcile asks every origin for its records. One that could not be asked when SQL was restored is heard in full. Of the others, a record
// that is newer than SQL is adopted (SQL went back in time), and one whose change is in the bucket already is taken back: its origin was
// away when the others forgot it. Records of this process may belong to changes under way and are left alone until they are settled.
func (x *Index) reconcile(ctx context.Context, began time.Time) error {
	var unheard []string
	v, err := x.db.Meta(ctx, metaUnheard)
	if err == nil && v != "" {
		err = json.Unmarshal([]byte(v), &unheard)
	}
	if err != nil {
		return fmt.Errorf("origins that were not heard: %w", err)
	}
	var errs []error
	for _, o := range x.origins.All() {
		late := slices.Contains(unheard, o.ID)
		if err := x.reconcileWith(ctx, o, late, began); err != nil {
			errs = append(errs, fmt.Errorf("origin %s: %w", o.ID, err))
		} else if late {
			unheard = slices.DeleteFunc(unheard, func(id string) bool { return id == o.ID })
			errs = append(errs, x.db.Update(ctx, func(tx *sql.Tx) error { return setUnheard(tx, unheard) }))
		}
	}
	return errors.Join(errs...)
}

func (x *Index) reconcileWith(ctx context.Context, o *registry.Origin, late bool, began time.Time) error {
	known, err := x.db.LastGeneration(ctx)
	if err != nil {
		return err
	}
	records, err := x.recordsOf(ctx, o)
	if err != nil {
		return err
	}
	if late {
		if err := x.adoptPending(ctx, o); err != nil {
			return err
		}
		return x.adoptAll(ctx, records, tombstones(records))
	}
	var newer []registry.NameRecord
	for _, r := range records {
		if r.Time.After(began) && time.Since(r.Time) < settled {
			continue
		}
		if r.Generation > known {
			newer = append(newer, r)
			continue
		}
		if queued, err := x.db.Queued(ctx, r.Generation); err != nil {
			return err
		} else if !queued {
			if err := o.DeleteName(ctx, r); err != nil {
				return err
			}
		}
	}
	return x.adoptAll(ctx, newer, tombstones(newer))
}

func (x *Index) recordsOf(ctx context.Context, o *registry.Origin) (out []registry.NameRecord, err error) {
	err = o.Names(ctx, func(r registry.NameRecord) error {
		x.sawGeneration(r.Generation)
		out = append(out, r)
		return nil
	})
	return out, err
}

// tombstones are the newest deletions of names.
func tombstones(records []registry.NameRecord) map[string]int64 {
	dead := map[string]int64{}
	for _, r := range records {
		if r.Kind == registry.NameDeleted {
			k := tombKey(r)
			dead[k] = max(dead[k], r.Generation)
		}
	}
	return dead
}

// tombKey is the name that a record changes: a tag, a manifest, or a membership.
func tombKey(r registry.NameRecord) string {
	switch {
	case r.Tag != "":
		return tagName(r.Repository, r.Tag)
	case r.Kind == registry.NameLayer || r.MediaType == registry.NameLayer:
		return layerName(r.Repository, r.Digest)
	}
	return manifestName(r.Repository, r.Digest)
}

// namesOf are all names that a record changes: a push by tag changes the tag and the manifest.
func namesOf(r registry.NameRecord) []string {
	if r.Kind == registry.NameManifest && r.Tag != "" {
		return []string{tombKey(r), manifestName(r.Repository, r.Digest)}
	}
	return []string{tombKey(r)}
}

func tagName(repo, tag string) string                  { return repo + "\x00tag " + tag }
func manifestName(repo string, d digest.Digest) string { return repo + "\x00manifest " + d.String() }
func layerName(repo string, d digest.Digest) string    { return repo + "\x00layer " + d.String() }

func (x *Index) adoptPending(ctx context.Context, o *registry.Origin) error {
	return o.Pending(ctx, func(p registry.PendingBlob) error {
		for _, repo := range p.Repositories {
			if err := x.putLayer(ctx, repo, registry.Layer{Digest: p.Digest, Size: p.Size}); err != nil {
				return err
			}
		}
		return nil
	})
}

// adoptAll takes over, oldest first, the records that SQL does not know, and queues them for the bucket.
func (x *Index) adoptAll(ctx context.Context, records []registry.NameRecord, dead map[string]int64) error {
	slices.SortFunc(records, func(a, b registry.NameRecord) int {
		return cmp.Or(cmp.Compare(a.Generation, b.Generation), strings.Compare(registry.NameKey(a), registry.NameKey(b)))
	})
	records = slices.CompactFunc(records, func(a, b registry.NameRecord) bool { // replicas
		return a.Generation == b.Generation && registry.NameKey(a) == registry.NameKey(b)
	})
	for _, r := range records {
		if err := x.adopt(ctx, r, dead); err != nil {
			return err
		}
	}
	if len(records) == 0 {
		return nil
	}
	select {
	case x.kick <- struct{}{}:
	default:
	}
	// SQL has all changes up to here now: what origins still keep of them can go.
	return x.db.Update(ctx, func(tx *sql.Tx) error { return tx.RaiseGeneration(records[len(records)-1].Generation) })
}

func (x *Index) adopt(ctx context.Context, r registry.NameRecord, dead map[string]int64) error {
	if r.Kind == registry.NameManifest {
		if dead[manifestName(r.Repository, r.Digest)] > r.Generation {
			return nil
		}
		if r.Tag != "" && dead[tagName(r.Repository, r.Tag)] > r.Generation {
			r.Tag = "" // the tag is gone, the manifest is not
		}
	} else if r.Kind == registry.NameLayer && dead[tombKey(r)] > r.Generation {
		return nil
	}
	if known, err := x.known(ctx, r); err != nil || known {
		return err
	}
	return x.db.Update(ctx, func(tx *sql.Tx) error {
		switch {
		case r.Kind == registry.NameManifest:
			p, err := parseManifest(r.MediaType, r.Bytes)
			if err != nil {
				return fmt.Errorf("manifest %s of %s was accepted by another version: start that one: %w", r.Digest, r.Repository, err)
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

// known says whether SQL has what a record says.
func (x *Index) known(ctx context.Context, r registry.NameRecord) (bool, error) {
	switch r.Kind {
	case registry.NameLayer:
		_, err := x.db.Layer(ctx, r.Repository, r.Digest)
		return err == nil, ignoreMissing(err)
	case registry.NameManifest:
		ok, err := x.db.HasManifest(ctx, r.Repository, r.Digest)
		if err != nil || !ok || r.Tag == "" {
			return ok, err
		}
		_, gen, err := x.db.Tag(ctx, r.Repository, r.Tag)
		return err == nil && gen >= r.Generation, ignoreMissing(err)
	}
	return false, nil
}

// fromBucket reads every name in a bucket: first what is there, then the tags, which need the manifests.
func (x *Index) fromBucket(ctx context.Context, name string, b bucket.Bucket, dead map[string]int64) error {
	type tag struct{ repo, tag string }
	var tags []tag
	err := b.List(ctx, layout.RepositoriesRoot, func(o bucket.Object) error {
		kind, repo, t, d := layout.ParseKey(o.Key)
		switch kind {
		case layout.KindRevision:
			return x.restoreManifest(ctx, b, repo, d, dead)
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

func (x *Index) restoreManifest(ctx context.Context, b bucket.Bucket, repo string, d digest.Digest, dead map[string]int64) error {
	if dead[manifestName(repo, d)] > 0 {
		return nil
	}
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
	return x.db.Update(ctx, func(tx *sql.Tx) error {
		return tx.PutManifest(sql.Manifest{
			Repository: repo, Digest: d, MediaType: mediaType, ArtifactType: p.artifactType, Subject: p.subject, Bytes: raw,
		})
	})
}

func (x *Index) restoreLayer(ctx context.Context, b bucket.Bucket, repo string, d digest.Digest, dead map[string]int64) error {
	if dead[layerName(repo, d)] > 0 {
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
	return x.putLayer(ctx, repo, registry.Layer{Digest: d, Size: o.Size})
}

func (x *Index) restoreTag(ctx context.Context, b bucket.Bucket, repo, tag string, dead map[string]int64) error {
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
	x.sawGeneration(rec.Generation)
	ok, err := x.db.HasManifest(ctx, repo, rec.Digest)
	if err != nil || !ok || dead[tagName(repo, tag)] > rec.Generation {
		return err
	}
	return x.db.Update(ctx, func(tx *sql.Tx) error { return tx.PutTag(repo, tag, rec.Digest, rec.Generation) })
}

func ignoreGone(err error) error {
	if errors.Is(err, bucket.ErrNotFound) {
		return nil
	}
	return err
}
