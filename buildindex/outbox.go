package buildindex

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

const (
	outboxBatch = 100
	outboxPoll  = 500 * time.Millisecond
	outboxMax   = 10 * time.Second // between tries while the bucket is down
)

var errNotDurable = errors.New("the bucket lacks what the name refers to")

// outbox writes changes to the bucket, oldest first, until ctx is done. A name is written only after everything that it
// refers to is there.
func (x *Index) outbox(ctx context.Context) error {
	wait := outboxPoll
	for {
		left, err := x.drain(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			x.m.outboxErrors.Inc()
			text := err.Error()
			x.lastErr.Store(&text)
			x.log.Warn("names will be written to the bucket later", "in", wait, "error", err)
			wait = min(2*wait, outboxMax)
		default:
			x.lastErr.Store(nil)
			wait = outboxPoll
		}
		if err == nil && !left {
			wait = time.Minute
		}
		select {
		case <-ctx.Done():
			return nil
		case <-x.kick:
		case <-time.After(wait):
		}
		if wait == time.Minute {
			wait = outboxPoll
		}
	}
}

// unreachableMax is after how many rows in a row whose origins can't be reached a round ends.
const unreachableMax = 5

// drain works once through the outbox. left says that rows have to wait; an error, that the bucket or the origins could
// not be asked. A row that fails for a reason of its own is set aside for a while, and the others go on.
func (x *Index) drain(ctx context.Context) (left bool, err error) {
	// A deletion waits for earlier changes of its name: its tombstone is what keeps them deleted if this disk is lost.
	waiting := map[cluster.Name]bool{}
	after := int64(0)
	unreachable := 0
	var last revision
	for {
		rows, err := x.db.Outbox(ctx, after, outboxBatch)
		if err != nil {
			return true, err
		}
		if len(rows) == 0 {
			return left, nil
		}
		var done []names.OutboxRow
		for _, row := range rows {
			after = row.ID
			if c := row.Record.Change(); c.Act == cluster.Delete && waiting[c.Name] {
				left = true
				continue
			}
			perr := errNotDurable
			if x.aside.due(row.ID) {
				perr = x.publishRow(ctx, row, &last)
			}
			switch {
			case perr == nil:
				done = append(done, row)
				unreachable = 0
				continue
			case errors.Is(perr, errNotDurable):
			default:
				if errors.Is(perr, registry.ErrUnavailable) {
					unreachable++
				}
				if unreachable >= unreachableMax || x.outage(ctx, row.Record.Repository) {
					return true, errors.Join(perr, x.published(ctx, done))
				}
				x.setRowAside(row, perr)
			}
			left = true
			for _, c := range row.Record.Changes() {
				waiting[c.Name] = true
			}
		}
		if err := x.published(ctx, done); err != nil {
			return true, err
		}
	}
}

// revision is a manifest of a repository. The last one that a round has written is not written again for its other
// tags.
type revision struct {
	repository string
	digest     digest.Digest
	mediaType  string
}

func (x *Index) publishRow(ctx context.Context, row names.OutboxRow, last *revision) error {
	if row.Err != nil {
		return row.Err
	}
	return x.publish(ctx, row.Record, last)
}

// outage reports whether the bucket of a repository can't be asked anything, so that no row is to blame.
func (x *Index) outage(ctx context.Context, repo string) bool {
	_, b, ok := x.buckets.For(repo)
	if !ok {
		return false
	}
	limit, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := b.Stat(limit, layout.ProbeKey)
	return err != nil && !errors.Is(err, bucket.ErrNotFound)
}

func (x *Index) setRowAside(row names.OutboxRow, err error) {
	x.m.outboxErrors.Inc()
	if x.aside.failed(row, err) {
		r := row.Record
		x.log.Warn("a change can't be written to the bucket and is set aside; others go on", "row", row.ID, "kind", r.Kind,
			"repository", r.Repository, "tag", r.Tag, "digest", r.Digest, "error", err)
	}
}

// published forgets changes that the bucket has, in one transaction: after a crash before it they are written once
// more.
func (x *Index) published(ctx context.Context, rows []names.OutboxRow) error {
	if len(rows) == 0 {
		return nil
	}
	err := x.db.Update(ctx, func(tx names.Tx) error {
		for _, row := range rows {
			if err := tx.Done(row.ID); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	x.m.published.Add(float64(len(rows)))
	for _, row := range rows {
		x.aside.done(row.ID)
		x.forget(ctx, row.Record)
	}
	return nil
}

// publish writes one change to the bucket.
func (x *Index) publish(ctx context.Context, r cluster.NameRecord, last *revision) error {
	_, b, ok := x.buckets.For(r.Repository)
	if !ok {
		return fmt.Errorf("no bucket is configured for repository %s", r.Repository)
	}
	switch c := r.Change(); {
	case c.Act == cluster.Delete:
		*last = revision{}
		return x.publishDeletion(ctx, b, c)
	case c.PutsManifest():
		return x.publishManifest(ctx, b, r, last)
	case c.Kind == cluster.Membership:
		if _, err := x.db.Layer(ctx, r.Repository, r.Digest); err != nil {
			return ignoreMissing(err) // deleted before it was written
		}
		if err := x.durable(ctx, r.Repository, []digest.Digest{r.Digest}); err != nil {
			return err
		}
		return b.Put(ctx, layout.LayerLink(r.Repository, r.Digest), link(r.Digest))
	}
	return fmt.Errorf("outbox has a record of kind %q, which this program does not know", r.Kind)
}

func link(d digest.Digest) *bytes.Reader { return bytes.NewReader(layout.Link(d)) }

// tagRecord is beside a tag's link; its generation tells which of two copies of a name is newer.
type tagRecord struct {
	Digest     digest.Digest `json:"digest"`
	MediaType  string        `json:"media_type"`
	Generation int64         `json:"generation"`
	Time       time.Time     `json:"time"`
}

func (x *Index) publishManifest(ctx context.Context, b bucket.Bucket, r cluster.NameRecord, last *revision) error {
	if last.repository != r.Repository || last.digest != r.Digest {
		m, err := x.db.Manifest(ctx, r.Repository, registry.Reference{Digest: r.Digest})
		if err != nil {
			return ignoreMissing(err) // deleted before it was written
		}
		if err := x.publishRevision(ctx, b, r.Repository, m); err != nil {
			return err
		}
		*last = revision{r.Repository, r.Digest, m.MediaType}
	}
	if r.Tag == "" {
		return nil
	}
	return x.publishTag(ctx, b, r, last.mediaType)
}

// linksAtOnce is how many links of one manifest are written at the same time: it may have thousands, and others wait.
const linksAtOnce = 16

// publishRevision writes a manifest and its links, that of the manifest last.
func (x *Index) publishRevision(ctx context.Context, b bucket.Bucket, repo string, m names.Manifest) error {
	p, err := parseManifest(m.MediaType, m.Bytes)
	if err != nil {
		return err
	}
	if !x.cfg.lax(repo) {
		if err := x.referencesDurable(ctx, b, repo, p); err != nil {
			return err
		}
	}
	if err := b.Put(ctx, layout.BlobKey(m.Digest), bytes.NewReader(m.Bytes)); err != nil {
		return err
	}
	if registry.SniffMediaType(m.Bytes) != m.MediaType {
		if err := b.Put(ctx, layout.MediaTypeKey(m.Digest), bytes.NewReader([]byte(m.MediaType))); err != nil {
			return err
		}
	}
	links, linking := errgroup.WithContext(ctx)
	links.SetLimit(linksAtOnce)
	for _, d := range p.members {
		links.Go(func() error { return b.Put(linking, layout.LayerLink(repo, d), link(d)) })
	}
	if err := links.Wait(); err != nil {
		return err
	}
	return b.Put(ctx, layout.RevisionLink(repo, m.Digest), link(m.Digest))
}

// referencesDurable is errNotDurable while the bucket lacks what a manifest refers to.
func (x *Index) referencesDurable(ctx context.Context, b bucket.Bucket, repo string, p *parsed) error {
	blobs, manifests := p.blobs, p.manifests
	for _, d := range p.either {
		if ok, err := x.hasManifest(ctx, repo, d); err != nil {
			return err
		} else if ok {
			manifests = append(manifests, d)
		} else {
			blobs = append(blobs, d)
		}
	}
	if err := x.durable(ctx, repo, blobs); err != nil {
		return err
	}
	for _, d := range manifests {
		if _, err := b.Stat(ctx, layout.BlobKey(d)); errors.Is(err, bucket.ErrNotFound) {
			return fmt.Errorf("manifest %s: %w", d, errNotDurable)
		} else if err != nil {
			return err
		}
	}
	return nil
}

func (x *Index) publishTag(ctx context.Context, b bucket.Bucket, r cluster.NameRecord, mediaType string) error {
	// A tag that has moved on meanwhile is written by its own row.
	if now, err := x.db.Tag(ctx, r.Repository, r.Tag); errors.Is(err, names.ErrNotFound) || (err == nil && (now.Generation > r.Generation || now.Digest != r.Digest)) {
		return nil
	} else if err != nil {
		return err
	}
	rec, err := json.Marshal(tagRecord{r.Digest, mediaType, r.Generation, r.Time})
	if err != nil {
		return err
	}
	if err := b.Put(ctx, layout.TagIndexLink(r.Repository, r.Tag, r.Digest), link(r.Digest)); err != nil {
		return err
	}
	if err := b.Put(ctx, layout.TagRecordKey(r.Repository, r.Tag), bytes.NewReader(rec)); err != nil {
		return err
	}
	return b.Put(ctx, layout.TagCurrentLink(r.Repository, r.Tag), link(r.Digest))
}

func (x *Index) publishDeletion(ctx context.Context, b bucket.Bucket, c cluster.Change) error {
	switch c.Kind {
	case cluster.Tag:
		if now, err := x.db.Tag(ctx, c.Repository, c.Tag); err == nil && now.Generation > c.Generation {
			return nil // pushed again since
		} else if err != nil && !errors.Is(err, names.ErrNotFound) {
			return err
		}
		return errors.Join(
			b.Delete(ctx, layout.TagCurrentLink(c.Repository, c.Tag)),
			b.Delete(ctx, layout.TagRecordKey(c.Repository, c.Tag)))
	case cluster.Membership:
		if _, err := x.db.Layer(ctx, c.Repository, c.Digest); err == nil {
			return nil
		} else if !errors.Is(err, names.ErrNotFound) {
			return err
		}
		return b.Delete(ctx, layout.LayerLink(c.Repository, c.Digest))
	}
	if ok, err := x.hasManifest(ctx, c.Repository, c.Digest); err != nil || ok {
		return err
	}
	return b.Delete(ctx, layout.RevisionLink(c.Repository, c.Digest))
}

// durable asks the origins whether blobs are in the bucket. Each is asked for a blob once, and for as many at once as
// it takes.
func (x *Index) durable(ctx context.Context, repo string, ds []digest.Digest) error {
	left := map[digest.Digest]bool{}
	for _, d := range ds {
		left[d] = true
	}
	for rank := range x.cfg.Replicas {
		byOrigin := map[*cluster.Origin][]digest.Digest{}
		for d := range left {
			if owners := x.origins.Owners(d); rank < len(owners) {
				byOrigin[owners[rank]] = append(byOrigin[owners[rank]], d)
			}
		}
		var errs []error
		for o, all := range byOrigin {
			for asked := range slices.Chunk(all, cluster.MaxDurableDigests) {
				resp, err := o.Durable(ctx, repo, asked)
				if err != nil {
					errs = append(errs, fmt.Errorf("origin %s: %w", o.ID, err))
					break
				}
				for _, d := range resp.Durable {
					delete(left, d)
				}
			}
		}
		if len(left) == 0 {
			return nil
		}
		if len(errs) > 0 && rank == x.cfg.Replicas-1 {
			return errors.Join(errs...)
		}
	}
	for d := range left {
		return fmt.Errorf("%d blobs, %s among them: %w", len(left), d, errNotDurable)
	}
	return nil
}
