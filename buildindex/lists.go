package buildindex

import (
	"context"
	"errors"
	"fmt"

	"kraken/buildindex/names"
	"kraken/proto/registry"
)

// listed turns n+1 rows into a page of n.
func listed(rows []string, n int) registry.Names {
	if n >= 0 && len(rows) > n {
		return registry.Names{Names: rows[:n], More: true}
	}
	return registry.Names{Names: rows}
}

const pageLimit = 10_000

func pageSize(p registry.Page) int {
	if p.N < 0 {
		return pageLimit
	}
	return min(p.N, pageLimit)
}

// ListTags is one page of a repository's tags.
func (x *Index) ListTags(ctx context.Context, repo string, p registry.Page) (registry.Names, error) {
	if x.mirror.foreign(repo) {
		return x.mirror.listTags(ctx, repo, p)
	}
	if err := x.requireComplete(repo, "tags"); err != nil {
		return registry.Names{}, err
	}
	n := pageSize(p)
	tags, err := x.db.Tags(ctx, repo, p.Last, n+1)
	if errors.Is(err, names.ErrNotFound) {
		return registry.Names{}, fmt.Errorf("%w: repository %s", registry.ErrNameUnknown, repo)
	}
	if err != nil {
		return registry.Names{}, fmt.Errorf("list tags of %s: %w", repo, err)
	}
	return listed(tags, n), nil
}

// ListRepositories is one page of the catalog.
func (x *Index) ListRepositories(ctx context.Context, p registry.Page) (registry.Names, error) {
	if !x.restored.Load() || !x.heard() {
		return registry.Names{}, x.notYet("repositories")
	}
	n := pageSize(p)
	repos, err := x.db.Repositories(ctx, p.Last, n+1)
	if err != nil {
		return registry.Names{}, fmt.Errorf("list repositories: %w", err)
	}
	return listed(repos, n), nil
}
