package buildindex

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/buildindex/names"
	"kraken/proto/registry"
)

// listReferrers answers with what the upstream said refers to d within the tag's TTL, or last where it can't be asked.
// What was pushed to the repository is in the same list.
func (mi *mirror) listReferrers(ctx context.Context, repo string, d digest.Digest, artifactType string) (registry.ReferrersPage, error) {
	out := registry.ReferrersPage{Filtered: artifactType != ""}
	q, err := mi.about(ctx, repo)
	if err == nil && !q.granted {
		// That there is no list says nothing about who may read the repository: the upstream has to give the subject.
		ref := registry.Reference{Digest: d}
		err = mi.ask(ctx, q, ref.String(), coldPatience, func(ctx context.Context) error { return mi.askDigest(ctx, q, d) })
		q.granted = err == nil
	}
	if err != nil {
		return out, err
	}
	list, err := mi.referrers(ctx, q, d)
	if err != nil {
		return out, fmt.Errorf("list referrers of %s in %s: %w", d, repo, err)
	}
	if q.up.Import {
		own, err := mi.x.ownReferrers(ctx, repo, d, "", "")
		if err != nil {
			return out, err
		}
		list = append(list, own.Descriptors...)
	}
	seen := map[digest.Digest]bool{}
	for _, desc := range list {
		if !seen[desc.Digest] && (artifactType == "" || desc.ArtifactType == artifactType) {
			out.Descriptors = append(out.Descriptors, desc)
		}
		seen[desc.Digest] = true
	}
	return out, nil
}

func (mi *mirror) referrers(ctx context.Context, q question, d digest.Digest) ([]v1.Descriptor, error) {
	last, err := mi.x.db.MirroredReferrers(ctx, q.repo, d)
	known := err == nil
	if err != nil && !errors.Is(err, names.ErrNotFound) {
		return nil, err
	}
	age := time.Since(last.Checked)
	if known {
		mi.use(q.repo, d)
	}
	if known && q.granted && q.fresh(last.Checked) {
		return last.Descriptors, nil
	}
	stale := known && q.granted && age < time.Duration(q.up.StaleFor)
	patience := coldPatience
	if stale {
		patience = time.Duration(q.up.Patience)
	}
	err = mi.ask(ctx, q, "referrers "+d.String(), patience, func(ctx context.Context) error { return mi.askReferrers(ctx, q, d) })
	switch {
	case err == nil:
		now, err := mi.x.db.MirroredReferrers(ctx, q.repo, d)
		return now.Descriptors, err
	case stale && errors.Is(err, registry.ErrUnavailable):
		mi.m.answered(q, answerStale)
		return last.Descriptors, nil
	}
	mi.m.failed(q, err)
	return nil, err
}

// askReferrers asks the upstream what refers to d: by the API, or, of a registry without it, by the tag schema.
func (mi *mirror) askReferrers(ctx context.Context, q question, d digest.Digest) error {
	if last, err := mi.x.db.MirroredReferrers(ctx, q.repo, d); err == nil && q.fresh(last.Checked) {
		return nil // answered meanwhile
	}
	if err := mi.x.roomForMore(); err != nil {
		return fmt.Errorf("%w: keep referrers of %s in %s: %w", registry.ErrUnavailable, d, q.repo, err)
	}
	list, err := q.up.Referrers(ctx, q.remote, d)
	if errors.Is(err, registry.ErrManifestUnknown) {
		list, err = mi.schemaReferrers(ctx, q, d)
	}
	if err != nil {
		return err
	}
	r := names.MirroredReferrers{Descriptors: list, Checked: time.Now()}
	if err := mi.x.db.Update(ctx, func(tx names.Tx) error { return tx.PutMirroredReferrers(q.repo, d, r) }); err != nil {
		return fmt.Errorf("%w: keep referrers of %s in %s: %w", registry.ErrUnavailable, d, q.repo, mi.x.full(err))
	}
	return nil
}

// schemaReferrers reads the index that clients keep under the tag of d; where there is none, nothing refers to d.
func (mi *mirror) schemaReferrers(ctx context.Context, q question, d digest.Digest) ([]v1.Descriptor, error) {
	m, err := q.up.Manifest(ctx, q.remote, registry.Reference{Tag: fallbackTag(d)})
	if errors.Is(err, registry.ErrManifestUnknown) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	p, err := parseManifest("", m.Bytes)
	if err != nil || p.children == nil {
		return nil, nil // a tag of this name that is no index
	}
	return p.children, nil
}
