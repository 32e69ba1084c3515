package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// An agent's cache holds bytes, and bytes are of no repository. So build-index is asked whether the repository that a
// blob is read by has it; the answer counts for manifest_ttl, which is how soon a deletion is seen here.

// members are the memberships that build-index confirmed, by "repo@digest", and when.
type members struct{ seen *lru.Cache[string, time.Time] }

// knownMembers bounds them. One that was forgotten is asked for again.
const knownMembers = 100_000

func newMembers() (members, error) {
	seen, err := lru.New[string, time.Time](knownMembers)
	return members{seen}, err
}

func memberKey(repo string, d digest.Digest) string { return repo + "@" + d.String() }

// confirmed returns when build-index confirmed a membership last, at most limit ago.
func (m members) confirmed(repo string, d digest.Digest, limit time.Duration) bool {
	at, ok := m.seen.Get(memberKey(repo, d))
	return ok && time.Since(at) < limit
}

func (m members) add(repo string, ds ...digest.Digest) {
	now := time.Now()
	for _, d := range ds {
		m.seen.Add(memberKey(repo, d), now)
	}
}

// checkMember returns nil when a repository of the cluster's own has a blob, ErrBlobUnknown when it has not. While
// build-index is unreachable what it confirmed within stale_tags counts; what it never confirmed counts where everybody
// may read everything, because then the digest alone is asked for.
func (a *Agent) checkMember(ctx context.Context, repo string, d digest.Digest) error {
	if a.members.confirmed(repo, d, time.Duration(a.cfg.ManifestTTL)) {
		return nil
	}
	err, unreachable := a.indexHealth.ask(ctx, func(ctx context.Context) error {
		_, err := a.index.GetLayer(ctx, repo, d)
		return err
	})
	switch {
	case err == nil:
		a.members.add(repo, d)
		return nil
	case unreachable != nil:
		if a.door == nil || a.members.confirmed(repo, d, time.Duration(a.cfg.StaleTags)) {
			return nil
		}
		return fmt.Errorf("%w: whether %s has %s can't be asked: %w", registry.ErrUnavailable, repo, d, err)
	case errors.Is(err, registry.ErrBlobUnknown):
		a.members.seen.Remove(memberKey(repo, d))
	}
	return fmt.Errorf("blob %s of %s: %w", d, repo, err)
}

// learnMembers asks build-index in one request which blobs of a manifest its repository has: a runtime reads them next.
// What it can't learn is asked for blob by blob.
func (a *Agent) learnMembers(ctx context.Context, repo string, m *registry.Manifest) {
	if m.Warning != "" {
		return // build-index is unreachable
	}
	raw := m.Bytes
	if raw == nil {
		raw = a.cachedManifest(m.Digest)
	}
	var doc struct {
		Config *v1.Descriptor  `json:"config"`
		Layers []v1.Descriptor `json:"layers"`
	}
	if json.Unmarshal(raw, &doc) != nil {
		return
	}
	blobs := doc.Layers
	if doc.Config != nil {
		blobs = append(blobs, *doc.Config)
	}
	var ask []digest.Digest
	for _, b := range blobs {
		if len(ask) < cluster.MaxMembers && !a.members.confirmed(repo, b.Digest, time.Duration(a.cfg.ManifestTTL)/2) {
			ask = append(ask, b.Digest)
		}
	}
	if len(ask) == 0 {
		return
	}
	_, _, _ = a.resolve.Do("members "+memberKey(repo, m.Digest), func() (any, error) {
		got, err := a.index.Members(context.WithoutCancel(ctx), repo, ask)
		if err != nil {
			a.log.Debug("the members of a repository were not learned at once", "repository", repo, "error", err)
			return nil, nil
		}
		a.members.add(repo, got...)
		return nil, nil
	})
}
