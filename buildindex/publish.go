package buildindex

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// requestsAtOnce is how many requests one change has under way.
const requestsAtOnce = 8

// timestamp is the content of objects whose keys say everything, for people.
func timestamp() *bytes.Reader { return bytes.NewReader([]byte(time.Now().UTC().Format(time.RFC3339))) }

func link(d digest.Digest) *bytes.Reader { return bytes.NewReader(layout.Link(d)) }

// stampsOf returns what a bucket has of a name: the winning stamp, of generation 0 when there is none, and the others.
func stampsOf(ctx context.Context, b bucket.Bucket, n cluster.Name) (top layout.Stamp, others []layout.Stamp, err error) {
	err = b.List(ctx, layout.StampsPrefix(n), "", func(o bucket.Object) error {
		s, ok := layout.ParseStamp(o.Key)
		switch {
		case !ok:
		case top.Generation == 0:
			top = s
		case s.Wins(top.Change):
			top, others = s, append(others, top)
		default:
			others = append(others, s)
		}
		return nil
	})
	return top, others, err
}

// putStamp writes a change of a name to a bucket, unless that has a later one: the stamp first, which is what counts,
// then the links that other registries read. Older stamps go, so that a name has one.
func putStamp(ctx context.Context, b bucket.Bucket, s layout.Stamp) error {
	top, others, err := stampsOf(ctx, b, s.Name)
	if err != nil {
		return err
	}
	if top.Generation > 0 && top.Wins(s.Change) {
		return nil
	}
	if top != s {
		if err := b.Put(ctx, s.Key(), timestamp()); err != nil {
			return err
		}
		if top.Generation > 0 {
			others = append(others, top)
		}
	}
	if s.Act == cluster.Delete {
		err = deleteLinks(ctx, b, s.Name)
	} else {
		err = putLinks(ctx, b, s)
	}
	for _, old := range others {
		err = errors.Join(err, b.Delete(ctx, old.Key()))
	}
	return err
}

func putLinks(ctx context.Context, b bucket.Bucket, s layout.Stamp) error {
	switch s.Kind {
	case cluster.Membership:
		return b.Put(ctx, layout.LayerLink(s.Repository, s.Digest), link(s.Digest))
	case cluster.Manifest:
		return b.Put(ctx, layout.RevisionLink(s.Repository, s.Digest), link(s.Digest))
	}
	if err := b.Put(ctx, layout.TagIndexLink(s.Repository, s.Tag, s.Target), link(s.Target)); err != nil {
		return err
	}
	return b.Put(ctx, layout.TagCurrentLink(s.Repository, s.Tag), link(s.Target))
}

// deleteLinks removes what other registries would take for the name.
func deleteLinks(ctx context.Context, b bucket.Bucket, n cluster.Name) error {
	switch n.Kind {
	case cluster.Membership:
		return b.Delete(ctx, layout.LayerLink(n.Repository, n.Digest))
	case cluster.Manifest:
		return b.Delete(ctx, layout.RevisionLink(n.Repository, n.Digest))
	}
	var keys []string
	err := b.List(ctx, layout.TagPrefix(n.Repository, n.Tag), "", func(o bucket.Object) error { keys = append(keys, o.Key); return nil })
	for _, key := range keys {
		err = errors.Join(err, b.Delete(ctx, key))
	}
	return err
}

// tagRecord is beside a tag's link, for build-indexes of the version before stamps.
type tagRecord struct {
	Digest     digest.Digest `json:"digest"`
	MediaType  string        `json:"media_type"`
	Generation int64         `json:"generation"`
	Time       time.Time     `json:"time"`
}

// putTag writes what a tag names. The manifest is there already.
func putTag(ctx context.Context, b bucket.Bucket, r cluster.NameRecord, mediaType string) error {
	rec, err := json.Marshal(tagRecord{r.Digest, mediaType, r.Generation, r.Time})
	if err != nil {
		return err
	}
	var g errgroup.Group
	g.Go(func() error { return b.Put(ctx, layout.TagRecordKey(r.Repository, r.Tag), bytes.NewReader(rec)) })
	g.Go(func() error {
		return putStamp(ctx, b, layout.Stamp{Change: r.Change()})
	})
	return g.Wait()
}

// putRevision writes a manifest's bytes, when the manifests that it refers to are there, and then its name.
func putRevision(ctx context.Context, b bucket.Bucket, m names.Manifest, refs []digest.Digest) error {
	g, each := errgroup.WithContext(ctx)
	g.SetLimit(requestsAtOnce)
	for _, d := range refs {
		g.Go(func() error {
			_, err := b.Stat(each, layout.BlobKey(d))
			if errors.Is(err, bucket.ErrNotFound) {
				return fmt.Errorf("manifest %s: %w", d, errNotDurable)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := b.Put(ctx, layout.BlobKey(m.Digest), bytes.NewReader(m.Bytes)); err != nil {
		return err
	}
	if registry.SniffMediaType(m.Bytes) != m.MediaType {
		if err := b.Put(ctx, layout.MediaTypeKey(m.Digest), bytes.NewReader([]byte(m.MediaType))); err != nil {
			return err
		}
	}
	return putStamp(ctx, b, layout.Stamp{Change: cluster.PutName(cluster.ManifestName(m.Repository, m.Digest)).At(max(m.Generation, 1))})
}
