package buildindex

import (
	"context"
	"errors"
	"fmt"
	"mime"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/origin/upstream"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// mirror answers for names of registries outside the cluster (proto/README.md, section 5, Upstreams). What they said is
// in SQL; a question under way, what was refused lately and what was granted are memory.
type mirror struct {
	x   *Index
	set *upstream.Set
	m   *mirrorMetrics

	mu      sync.Mutex
	flights map[string]*flight
	asking  *upstream.Budget // of flights
	tags    remembered[tagName, tagState]
	refused remembered[string, error] // by the key of the question
	grants  remembered[string, struct{}]
	lists   remembered[string, registry.Names] // of tags, by the key of the question
	used    remembered[cluster.Name, struct{}]
	reading *readers                  // of blobs, for a proof
	unsaved map[cluster.Name]struct{} // uses that SQL is to be told of
}

// tagName is a tag of an upstream's repository.
type tagName struct{ repo, tag string }

// tagState is what the upstream said of a tag. It is newer than what SQL has: the time of an answer that changed
// nothing is written now and then only.
type tagState struct {
	names.MirroredTag
	saved time.Time // Checked as it is in SQL
}

// Bounds of the mirror's memory, and of its patience.
const (
	maxMirroredTags = 1 << 16
	maxRefused      = 1 << 14
	maxGrants       = 1 << 16
	maxTagLists     = 64 // of pageLimit tags
	// coldPatience is how long an upstream is waited for when nothing is known: less than runtimes wait for headers.
	coldPatience = 20 * time.Second
	// restBetween is how long an upstream that did not answer about a name is not asked again about it.
	restBetween = 5 * time.Second
)

func newMirror(x *Index, set *upstream.Set, m *mirrorMetrics) *mirror {
	return &mirror{
		x: x, set: set, m: m, unsaved: map[cluster.Name]struct{}{}, flights: map[string]*flight{}, asking: upstream.NewBudget("questions to upstreams are under way", maxFlights),
		tags: remembered[tagName, tagState]{max: maxMirroredTags}, refused: remembered[string, error]{max: maxRefused}, grants: remembered[string, struct{}]{max: maxGrants},
		used: remembered[cluster.Name, struct{}]{max: maxUsed}, reading: newReaders(),
		lists: remembered[string, registry.Names]{max: maxTagLists},
	}
}

// question is a request for a name of an upstream's repository.
type question struct {
	repo    string // inside the cluster
	remote  string // at the registry
	up      *upstream.Registry
	mode    cluster.Mode
	grant   string // in mode caller, what the caller's grant is found by
	granted bool   // that is there, or none is needed
}

// key names the question about ref. Callers share no answer that may be a refusal.
func (q question) key(ref string) string { return q.grant + "\x00" + q.repo + "\x00" + ref }

// fresh reports whether what the upstream said at a time counts without asking again.
func (q question) fresh(at time.Time) bool {
	return time.Since(at) < time.Duration(q.up.TagTTL) || q.up.Offline()
}

// mayRead reports whether the caller has a grant now, or needs none.
func (mi *mirror) mayRead(q question) bool {
	if q.granted {
		return true
	}
	_, ok := mi.grants.get(q.grant)
	return ok
}

// foreign reports whether a repository is an upstream's: where any is mirrored, all whose names are of that form.
func (mi *mirror) foreign(repo string) bool {
	_, _, ok := cluster.SplitUpstream(repo)
	return ok && mi.set.Public().Any()
}

// about returns the question of a request, ErrNameUnknown for what is not mirrored, ErrUnauthorized in mode caller for
// a request that presents nothing.
func (mi *mirror) about(ctx context.Context, repo string) (question, error) {
	up, remote, ok := mi.set.For(repo)
	if !ok {
		return question{}, fmt.Errorf("%w: %s is of a registry that is not mirrored here", registry.ErrNameUnknown, repo)
	}
	entry, _ := mi.set.Public().Match(up.Host)
	q := question{repo: repo, remote: remote, up: up, mode: entry.Mode(remote), granted: true}
	if q.mode != cluster.ModeCaller {
		return q, nil
	}
	c, ok := upstream.BasicCredential(cluster.Authorization(ctx))
	if !ok {
		return q, fmt.Errorf("%w: %s is given to who may read it at %s", registry.ErrUnauthorized, repo, up.Host)
	}
	q.grant = repo + "\x00" + mi.set.Grant(up.Host, c)
	_, q.granted = mi.grants.get(q.grant)
	as, err := up.As(c)
	if err != nil {
		return q, err
	}
	q.up = as
	return q, nil
}

// getManifest answers by tag or digest.
func (mi *mirror) getManifest(ctx context.Context, repo string, ref registry.Reference, o registry.GetOptions) (*registry.Manifest, error) {
	q, err := mi.about(ctx, repo)
	if err != nil {
		return nil, err
	}
	d, warning := ref.Digest, ""
	if ref.Tag != "" {
		d, warning, err = mi.tag(ctx, q, ref.Tag)
	} else if !q.granted {
		err = mi.ask(ctx, q, ref.String(), coldPatience, func(ctx context.Context) error { return mi.askDigest(ctx, q, d) })
	}
	if err != nil {
		return nil, err
	}
	m, err := mi.manifest(ctx, q, d)
	if err != nil {
		return nil, err
	}
	out := &registry.Manifest{Digest: d, MediaType: m.MediaType, Bytes: m.Bytes, Warning: warning}
	if o.Have == d {
		out.Bytes = nil
	}
	return out, nil
}

// manifest returns the manifest of a digest, which the caller may read, from SQL or else from the upstream.
func (mi *mirror) manifest(ctx context.Context, q question, d digest.Digest) (names.Manifest, error) {
	m, err := mi.local(ctx, q.repo, d)
	if !errors.Is(err, names.ErrNotFound) {
		return m, err
	}
	ref := registry.Reference{Digest: d}
	err = mi.ask(ctx, q, ref.String(), coldPatience, func(ctx context.Context) error {
		_, err := mi.local(ctx, q.repo, d) // it may have come meanwhile
		if errors.Is(err, names.ErrNotFound) {
			_, err = mi.fetch(ctx, q, ref)
		}
		return err
	})
	if err != nil {
		return m, err
	}
	return mi.local(ctx, q.repo, d)
}

// local returns a manifest that the cluster has, ErrNotFound when it does not: of the mirror, or of the cluster's own,
// imported or written back, whatever has the digest.
func (mi *mirror) local(ctx context.Context, repo string, d digest.Digest) (names.Manifest, error) {
	m, err := mi.x.db.MirroredManifest(ctx, repo, d)
	if err == nil {
		mi.use(repo, d)
	}
	if errors.Is(err, names.ErrNotFound) {
		m, err = mi.x.manifest(ctx, repo, registry.Reference{Digest: d})
		if errors.Is(err, registry.ErrUnavailable) {
			err = names.ErrNotFound // being restored: the upstream knows
		}
	}
	return m, err
}

// fetch reads a manifest from the upstream into SQL, and the tag where ref is one, and returns its digest.
func (mi *mirror) fetch(ctx context.Context, q question, ref registry.Reference) (digest.Digest, error) {
	if err := mi.x.roomForMore(); err != nil {
		return "", fmt.Errorf("%w: keep %s of %s: %w", registry.ErrUnavailable, ref, q.repo, err)
	}
	got, err := q.up.Manifest(ctx, q.remote, ref)
	if err != nil {
		return "", err
	}
	mediaType := got.MediaType
	if mt, _, err := mime.ParseMediaType(mediaType); err == nil {
		mediaType = mt
	}
	p, err := parseManifest("", got.Bytes)
	if err != nil {
		p, err = parseManifest(mediaType, got.Bytes)
	}
	if err == nil {
		err = p.bounded()
	}
	if err != nil {
		return "", fmt.Errorf("%w: %s of %s at %s: %w", errNotMirrored, ref, q.remote, q.up.Host, err)
	}
	m := names.Manifest{Repository: q.repo, Digest: got.Digest, MediaType: p.mediaType, ArtifactType: p.artifactType, Subject: p.subject, Bytes: got.Bytes}
	now := time.Now()
	err = mi.x.db.Update(ctx, func(tx names.Tx) error {
		err := tx.PutMirroredManifest(m, p.sizes)
		if err == nil && ref.Tag != "" {
			err = tx.PutMirroredTag(q.repo, ref.Tag, names.MirroredTag{Digest: got.Digest, Checked: now})
		}
		return err
	})
	if err != nil {
		return "", fmt.Errorf("%w: keep %s of %s: %w", registry.ErrUnavailable, ref, q.repo, mi.x.full(err))
	}
	if ref.Tag != "" {
		mi.tags.put(tagName{q.repo, ref.Tag}, tagState{names.MirroredTag{Digest: got.Digest, Checked: now}, now}, 0)
	}
	return got.Digest, nil
}

// errNotMirrored is a manifest of a kind that build-index does not know. It is no 404: the upstream has it.
var errNotMirrored = &registry.Error{Code: "UNAVAILABLE", Status: 503, Message: "the upstream's manifest is of a kind that is not mirrored"}

// askDigest asks whether a caller may read a digest, and grants it.
func (mi *mirror) askDigest(ctx context.Context, q question, d digest.Digest) error {
	if mi.mayRead(q) {
		return nil
	}
	ref := registry.Reference{Digest: d}
	if _, err := mi.local(ctx, q.repo, d); errors.Is(err, names.ErrNotFound) {
		if _, err := mi.fetch(ctx, q, ref); err != nil {
			return err
		}
	} else if _, err := q.up.Head(ctx, q.remote, ref); err != nil {
		return err
	}
	mi.allow(q)
	return nil
}

// allow notes that the upstream has answered the caller.
func (mi *mirror) allow(q question) {
	if q.mode == cluster.ModeCaller {
		mi.grants.put(q.grant, struct{}{}, time.Duration(mi.x.cfg.Upstreams.GrantTTL))
	}
}
