package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// An agent's cache holds bytes, and bytes are of no repository. So build-index is asked whether the repository that a
// blob is read by has it, and whether the caller may read it there; the answer counts for manifest_ttl, which is how
// soon a deletion is seen here.

// members are what build-index confirmed that a repository has, by memberKey, and when.
type members struct{ seen *lru.Cache[string, time.Time] }

// knownMembers bounds them. One that was forgotten is asked for again.
const knownMembers = 100_000

func newMembers() (members, error) {
	seen, err := lru.New[string, time.Time](knownMembers)
	return members{seen}, err
}

// memberKey names what caller (callerOf) may read.
func memberKey(repo string, d digest.Digest, caller string) string {
	return repo + "@" + d.String() + caller
}

// confirmed reports whether build-index confirmed key at most limit ago.
func (m members) confirmed(key string, limit time.Duration) bool {
	at, ok := m.seen.Get(key)
	return ok && time.Since(at) < limit
}

func (m members) add(keys ...string) {
	now := time.Now()
	for _, k := range keys {
		m.seen.Add(k, now)
	}
}

// memberFor is how long a membership, or a manifest, counts for a caller without asking again.
func (a *Agent) memberFor(caller string) time.Duration {
	if ttl := time.Duration(a.cfg.ManifestTTL); caller == "" || ttl < grantedFor {
		return ttl
	}
	return grantedFor
}

// allForAll reports whether it is known that everybody may read everything that the cluster has. Then a digest alone is
// no secret.
func (a *Agent) allForAll() bool {
	return a.door == nil && a.namer.Known() && !a.namer.Upstreams().Private()
}

// checkMember returns nil when a repository has a blob, and the caller may read it there: ErrBlobUnknown when it has
// not, ErrUnauthorized and ErrDenied when an upstream says so. While build-index, or the upstream that it would have to
// ask, is unreachable, what was confirmed within stale_tags counts, of mode caller a moment ago; what was never
// confirmed counts where everybody may read everything.
func (a *Agent) checkMember(ctx context.Context, repo string, d digest.Digest) error {
	caller := a.callerOf(ctx, repo)
	key := memberKey(repo, d, caller)
	if a.members.confirmed(key, a.memberFor(caller)) {
		return nil
	}
	err, unreachable := a.indexHealth.ask(ctx, func(ctx context.Context) error {
		if _, _, ok := cluster.SplitUpstream(repo); ok { // also before this agent knows what is mirrored
			return a.index.Granted(ctx, repo, d)
		}
		_, err := a.index.GetLayer(ctx, repo, d)
		return err
	})
	switch {
	case err == nil:
		a.members.add(key)
		return nil
	case unreachable == nil:
		a.members.seen.Remove(key)
		return fmt.Errorf("blob %s of %s: %w", d, repo, err)
	case caller == "" && (a.allForAll() || a.members.confirmed(key, time.Duration(a.cfg.StaleTags))):
		return nil
	}
	return fmt.Errorf("%w: whether %s has %s can't be asked: %w", registry.ErrUnavailable, repo, d, err)
}

// checkStaleManifest returns nil when a manifest by digest may be given while build-index is unreachable: build-index
// confirmed within stale_tags that the repository has it, or everybody may read everything; and the caller was granted
// the repository. Any blob could else be read as a manifest of any repository.
func (a *Agent) checkStaleManifest(ctx context.Context, repo string, d digest.Digest) error {
	if err := a.mayReadStale(ctx, repo); err != nil {
		return err
	}
	if a.allForAll() || a.manifests.confirmed(memberKey(repo, d, ""), time.Duration(a.cfg.StaleTags)) {
		return nil
	}
	return fmt.Errorf("%w: whether %s has the manifest %s can't be asked", registry.ErrUnavailable, repo, d)
}

// learnMembers asks build-index in one request which blobs of a manifest its repository has, and the caller may read
// there: a runtime reads them next. What it can't learn is asked for blob by blob; a build-index that does not answer
// is silent for these questions, too.
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
	caller := a.callerOf(ctx, repo)
	for _, b := range blobs {
		if len(ask) < cluster.MaxMembers && !a.members.confirmed(memberKey(repo, b.Digest, caller), a.memberFor(caller)/2) {
			ask = append(ask, b.Digest)
		}
	}
	if len(ask) == 0 {
		return
	}
	_, _, _ = a.resolve.Do("members "+memberKey(repo, m.Digest, caller), func() (any, error) {
		var got []digest.Digest
		err, _ := a.indexHealth.ask(context.WithoutCancel(ctx), func(ctx context.Context) (err error) {
			got, err = a.index.Members(ctx, repo, ask)
			return err
		})
		if err != nil {
			a.log.Debug("the members of a repository were not learned at once", "repository", repo, "error", err)
			return nil, nil
		}
		for _, d := range got {
			a.members.add(memberKey(repo, d, caller))
		}
		return nil, nil
	})
}
