package buildindex

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// mayPush returns ErrUnsupported for a change of a name that is a registry's outside the cluster, unless what was
// pushed there may be imported. Else whoever may push here decided what a node gets under that registry's name.
func (x *Index) mayPush(repo string) error {
	if !x.mirror.foreign(repo) {
		return nil
	}
	host, _, _ := cluster.SplitUpstream(repo)
	entry, mirrored := x.mirror.set.Public().Match(host)
	switch {
	case mirrored && entry.Import:
		return nil
	case mirrored:
		return fmt.Errorf("%w: %s is a name of the registry %s, which is mirrored here: push it there, or let this cluster import it (import)", registry.ErrUnsupported, repo, host)
	}
	return fmt.Errorf("%w: %s is a name of the registry %s, which this cluster does not have names of: push to one without a host", registry.ErrUnsupported, repo, host)
}

// getLayer returns the membership of a blob in an upstream's repository: of what its known manifests refer to, or what
// was pushed.
func (mi *mirror) getLayer(ctx context.Context, repo string, d digest.Digest) (cluster.Layer, error) {
	size, err := mi.x.db.MirroredLayer(ctx, repo, d)
	if up, _, ok := mi.set.For(repo); errors.Is(err, names.ErrNotFound) && ok && (up.Import || up.WriteBack) {
		var own names.Layer
		own, err = mi.x.layer(ctx, repo, d)
		size = own.Size
	}
	if errors.Is(err, names.ErrNotFound) {
		return cluster.Layer{}, fmt.Errorf("%w: blob %s of %s", registry.ErrBlobUnknown, d, repo)
	}
	if err != nil {
		return cluster.Layer{}, fmt.Errorf("blob %s of %s: %w", d, repo, err)
	}
	return cluster.Layer{Digest: d, Size: size}, nil
}

// listTags is one page of the tags of an upstream's repository: as the upstream says now, or, where it can't be asked,
// those that the cluster knows. Where tags are imported these are listed alone.
func (mi *mirror) listTags(ctx context.Context, repo string, p registry.Page) (registry.Names, error) {
	q, err := mi.about(ctx, repo)
	if err != nil {
		return registry.Names{}, err
	}
	if !q.up.Import || !q.granted {
		asked, cancel := context.WithTimeout(ctx, coldPatience)
		defer cancel()
		l, err := q.up.Tags(asked, q.remote, p)
		if err == nil || !q.granted || !errors.Is(err, registry.ErrUnavailable) {
			return l, public(q, err)
		}
	}
	return mi.knownTags(ctx, repo, p)
}

func (mi *mirror) knownTags(ctx context.Context, repo string, p registry.Page) (registry.Names, error) {
	n := pageSize(p)
	tags, err := mi.x.db.MirroredTags(ctx, repo, p.Last, n+1)
	if err != nil {
		return registry.Names{}, fmt.Errorf("list tags of %s: %w", repo, err)
	}
	own, err := mi.x.db.Tags(ctx, repo, p.Last, n+1)
	if err != nil && !errors.Is(err, names.ErrNotFound) {
		return registry.Names{}, fmt.Errorf("list tags of %s: %w", repo, err)
	}
	if len(tags) == 0 && err != nil && p.Last == "" {
		return registry.Names{}, fmt.Errorf("%w: repository %s: no tag of it was asked for yet", registry.ErrNameUnknown, repo)
	}
	tags = append(tags, own...)
	slices.Sort(tags)
	tags = slices.Compact(tags)
	return listed(tags[:min(len(tags), n+1)], n), nil
}

// granted answers whether a caller may read a blob of a repository (GET grant/<digest>).
func (mi *mirror) granted(ctx context.Context, repo string, d digest.Digest) error {
	if !mi.foreign(repo) {
		return nil
	}
	q, err := mi.about(ctx, repo)
	if err != nil || q.mode != cluster.ModeCaller {
		return err
	}
	if !q.granted {
		err := mi.ask(ctx, q, "blob "+d.String(), coldPatience, func(ctx context.Context) error {
			_, err := q.up.StatBlob(ctx, q.remote, d)
			if err == nil {
				mi.allow(q)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	_, err = mi.getLayer(ctx, repo, d)
	return err
}

// serveUpstreams tells the other roles of the registries that the cluster mirrors.
func (x *Index) serveUpstreams(w http.ResponseWriter, _ *http.Request, _ registry.ExtensionPath) error {
	return transport.WriteJSON(w, http.StatusOK, x.mirror.set.Public())
}
