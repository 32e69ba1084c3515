package buildindex

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

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

// listTags is one page of the tags of an upstream's repository: as the upstream said within the tags' TTL, or, where it
// can't be asked, and where tags are imported, those that the cluster knows.
func (mi *mirror) listTags(ctx context.Context, repo string, p registry.Page) (registry.Names, error) {
	q, err := mi.about(ctx, repo)
	if err != nil {
		return registry.Names{}, err
	}
	if !q.up.Import || !q.granted {
		l, err := mi.askTags(ctx, q, p)
		if err == nil || !q.granted || !errors.Is(err, registry.ErrUnavailable) {
			return l, err
		}
	}
	return mi.knownTags(ctx, repo, p)
}

// askTags returns a page of tags of an upstream, by one question for all who ask within the tags' TTL.
func (mi *mirror) askTags(ctx context.Context, q question, p registry.Page) (registry.Names, error) {
	ref := fmt.Sprintf("tags %d %s", p.N, p.Last)
	key := q.key(ref)
	if l, ok := mi.lists.get(key); ok {
		return l, nil
	}
	keep := time.Duration(q.up.TagTTL)
	if q.mode == cluster.ModeCaller {
		keep = min(keep, time.Duration(mi.x.cfg.Upstreams.GrantTTL))
	}
	return askFor(ctx, mi, q, ref, times{coldPatience, coldPatience}, func(ctx context.Context) (registry.Names, error) {
		if l, ok := mi.lists.get(key); ok {
			return l, nil // answered meanwhile
		}
		l, err := q.up.Tags(ctx, q.remote, p)
		if err == nil {
			if len(l.Names) > pageLimit {
				l = listed(l.Names, pageLimit)
			}
			if keep > 0 {
				mi.lists.put(key, l, keep)
			}
		}
		return l, err
	})
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

// serveUpstreams tells the other roles of the registries that the cluster mirrors.
func (x *Index) serveUpstreams(w http.ResponseWriter, _ *http.Request, _ registry.ExtensionPath) error {
	return transport.WriteJSON(w, http.StatusOK, x.mirror.set.Public())
}
