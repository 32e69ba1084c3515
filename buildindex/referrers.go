package buildindex

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/buildindex/names"
	"kraken/proto/registry"
)

// One answer of referrers holds at most so many descriptors, and about so many bytes: their annotations can be large.
const (
	referrersPage  = 200
	referrersBytes = 1 << 20
)

// ListReferrers is one page of the manifests whose subject is d.
func (x *Index) ListReferrers(ctx context.Context, repo string, d digest.Digest, artifactType, cursor string) (registry.ReferrersPage, error) {
	if x.mirror.foreign(repo) {
		return x.mirror.listReferrers(ctx, repo, d, artifactType)
	}
	return x.ownReferrers(ctx, repo, d, artifactType, cursor)
}

// ownReferrers is one page of those that were pushed to the cluster.
func (x *Index) ownReferrers(ctx context.Context, repo string, d digest.Digest, artifactType, cursor string) (registry.ReferrersPage, error) {
	out := registry.ReferrersPage{Filtered: artifactType != ""}
	if err := x.requireComplete(repo, "referrers of "+d.String()); err != nil {
		return out, err
	}
	room := referrersBytes
	for len(out.Descriptors) < referrersPage {
		rows, err := x.db.Referrers(ctx, repo, d, cursor, referrersPage+1)
		if err != nil {
			return out, fmt.Errorf("list referrers of %s in %s: %w", d, repo, err)
		}
		for i, m := range rows {
			if len(out.Descriptors) == referrersPage || room <= 0 {
				out.Next = cursor
				return out, nil
			}
			if i == referrersPage {
				break
			}
			cursor = m.Digest.String()
			if artifactType != "" && m.ArtifactType != artifactType {
				continue
			}
			p, err := parseManifest(m.MediaType, m.Bytes)
			if err != nil {
				return out, fmt.Errorf("referrer %s of %s: %w", m.Digest, d, err)
			}
			room -= len(m.Bytes) // more than its annotations
			out.Descriptors = append(out.Descriptors, v1.Descriptor{
				MediaType: m.MediaType, Digest: m.Digest, Size: int64(len(m.Bytes)), ArtifactType: m.ArtifactType, Annotations: p.annotations,
			})
		}
		if len(rows) <= referrersPage {
			return out, x.addFallback(ctx, repo, d, artifactType, &out)
		}
	}
	out.Next = cursor
	return out, nil
}

// addFallback adds what clients listed under the referrers tag schema (specification, "Referrers Tag Schema") and SQL
// does not: these wrote it for a registry without the API, and this one may have been filled from such a one. It goes
// with the last page.
func (x *Index) addFallback(ctx context.Context, repo string, d digest.Digest, artifactType string, out *registry.ReferrersPage) error {
	m, err := x.db.Manifest(ctx, repo, registry.Reference{Tag: fallbackTag(d)})
	if errors.Is(err, names.ErrNotFound) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("list referrers of %s in %s: %w", d, repo, err)
	}
	p, err := parseManifest(m.MediaType, m.Bytes)
	if err != nil || p.children == nil {
		return nil // a tag of this name that is no index
	}
	for _, c := range p.children {
		if artifactType != "" && c.ArtifactType != artifactType {
			continue
		}
		m, err := x.db.StatManifest(ctx, repo, c.Digest)
		if errors.Is(err, names.ErrNotFound) || err == nil && m.Subject == d {
			continue // deleted, or listed already
		}
		if err != nil {
			return fmt.Errorf("list referrers of %s in %s: %w", d, repo, err)
		}
		out.Descriptors = append(out.Descriptors, c)
	}
	return nil
}

// fallbackTag is the tag of the referrers of d: algorithm and hex digits, cut to 32 and 64 characters.
func fallbackTag(d digest.Digest) string {
	cut := func(s string, n int) string { return s[:min(n, len(s))] }
	return cut(d.Algorithm().String(), 32) + "-" + cut(d.Encoded(), 64)
}
