package origin

import (
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"
)

// supplier is where a blob's bytes come from: a registry as somebody reads it, or the buckets of this cluster, which
// are the zero supplier. What one sends is no business of who reads the same digest from another before all was
// verified: it may send other bytes, slowly, or refuse.
type supplier struct {
	host   string // of the registry
	reader string // upstream.Registry.Reader
}

// fetchID names the fetch of a blob from a supplier. There is one at a time.
type fetchID struct {
	supplier
	digest digest.Digest
}

// question is a blob as an upstream is asked for it, by way of a repository. What the upstream says to it, "not there"
// and "not allowed" too, is true for that repository and reader alone.
type question struct {
	fetchID
	remote string
}

// key is q as text, for who keys by text.
func (q question) key() string {
	return fmt.Sprintf("%s %q %s@%s", q.host, q.reader, q.remote, q.digest)
}

// question returns what is asked for a blob of the repository.
func (u mirrored) question(d digest.Digest) question {
	return question{fetchID{supplier{u.registry.Host, u.registry.Reader()}, d}, u.remote}
}

// fromBucket is the fetch of a blob from a bucket.
func fromBucket(d digest.Digest) fetchID { return fetchID{digest: d} }

// inFlight returns the fetch under way here that brings d to readers of repo, or nil.
func (o *Origin) inFlight(ctx context.Context, repo string, d digest.Digest) *fetch {
	up, isUpstream := o.upstreamOf(ctx, repo)
	o.mu.Lock()
	defer o.mu.Unlock()
	if !isUpstream {
		return o.fetches[fromBucket(d)]
	}
	if f := o.fetches[fromBucket(d)]; f != nil && up.registry.WriteBack {
		return f
	}
	return o.fetches[up.question(d).fetchID]
}

// leasesOf returns what counts the leases of a blob for readers of repo: of one that still comes, those of its fetch.
func (o *Origin) leasesOf(ctx context.Context, repo string, d digest.Digest) *leases {
	if _, err := o.store.Stat(d); err != nil {
		if f := o.inFlight(ctx, repo, d); f != nil {
			return f.leases
		}
	}
	return o.leases
}
