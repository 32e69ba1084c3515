package sim

import (
	"context"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/buildindex/names/sqlite"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// database is SQL of one process: each call waits at its begin and end while the process is frozen, and fails once it
// is dead. So a build-index that stands still does nothing that looks into its database, as its lease. What is
// mirrored is not in the simulation.
type database struct {
	names.Store
	p *process
}

func (p *process) openNames(ctx context.Context, path string) (names.Store, error) {
	db, err := gated(p, func() (*sqlite.Store, error) { return sqlite.Open(ctx, path) })
	if err != nil {
		return nil, err
	}
	return database{db, p}, nil
}

// gated runs f between two gates of a process.
func gated[T any](p *process, f func() (T, error)) (v T, err error) {
	if err := p.gate(); err != nil {
		return v, err
	}
	out, err := f()
	if dead := p.gate(); dead != nil {
		return v, dead
	}
	return out, err
}

func (b database) Update(ctx context.Context, f func(tx names.Tx) error) error {
	_, err := gated(b.p, func() (any, error) { return nil, b.Store.Update(ctx, f) })
	return err
}

func (b database) Manifest(ctx context.Context, repo string, ref registry.Reference) (names.Manifest, error) {
	return gated(b.p, func() (names.Manifest, error) { return b.Store.Manifest(ctx, repo, ref) })
}

func (b database) StatManifest(ctx context.Context, repo string, d digest.Digest) (names.Manifest, error) {
	return gated(b.p, func() (names.Manifest, error) { return b.Store.StatManifest(ctx, repo, d) })
}

func (b database) Tag(ctx context.Context, repo, tag string) (names.Version, error) {
	return gated(b.p, func() (names.Version, error) { return b.Store.Tag(ctx, repo, tag) })
}

func (b database) TagsOf(ctx context.Context, repo string, d digest.Digest) ([]string, error) {
	return gated(b.p, func() ([]string, error) { return b.Store.TagsOf(ctx, repo, d) })
}

func (b database) Deleted(ctx context.Context, n cluster.Name) (int64, error) {
	return gated(b.p, func() (int64, error) { return b.Store.Deleted(ctx, n) })
}

func (b database) Layer(ctx context.Context, repo string, d digest.Digest) (names.Layer, error) {
	return gated(b.p, func() (names.Layer, error) { return b.Store.Layer(ctx, repo, d) })
}

func (b database) Outbox(ctx context.Context, bucket string, after int64, n int) ([]names.OutboxRow, error) {
	return gated(b.p, func() ([]names.OutboxRow, error) { return b.Store.Outbox(ctx, bucket, after, n) })
}

func (b database) Queued(ctx context.Context, generation int64) ([]names.OutboxRow, error) {
	return gated(b.p, func() ([]names.OutboxRow, error) { return b.Store.Queued(ctx, generation) })
}

func (b database) State(ctx context.Context) (names.State, error) {
	return gated(b.p, func() (names.State, error) { return b.Store.State(ctx) })
}

func (b database) Meta(ctx context.Context, key string) (string, error) {
	return gated(b.p, func() (string, error) { return b.Store.Meta(ctx, key) })
}
