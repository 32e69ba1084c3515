package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// StatBlob answers from the cache, from what a pull over the swarm has noted or from an origin's metadata, and never
// downloads.
func (a *Agent) StatBlob(ctx context.Context, repo string, d digest.Digest) (v1.Descriptor, error) {
	if info, err := a.store.Stat(d); err == nil {
		return v1.Descriptor{Digest: d, Size: info.Size}, nil
	}
	if m, err := a.store.Metainfo(d); err == nil {
		return v1.Descriptor{Digest: d, Size: m.Size}, nil
	}
	return a.origins.StatBlob(ctx, repo, d)
}

// OpenBlob opens the cached file, or joins the download of d and streams it while it arrives, or, when it is small,
// once it is verified. What the cache has no room for is relayed, and so is what is on its way from another registry.
// What another caller began, and the upstream then refused him, is begun anew with what this one has shown.
func (a *Agent) OpenBlob(ctx context.Context, repo string, d digest.Digest, hint registry.Range) (*registry.Content, error) {
	for others := 0; ; {
		r, err := a.open(ctx, d, hint)
		if err == nil {
			a.m.hits.Inc()
			return a.watch(&registry.Content{Digest: d, Size: r.Info().Size, File: r.File(), Close: r.Close}, hint), nil
		}
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		why := unreadable
		if errors.Is(err, store.ErrNotFound) {
			why = notCached
		}
		p, wait, err := a.join(ctx, repo, d, why)
		if errors.Is(err, errOtherRegistry) {
			return a.relayed(ctx, repo, d, hint)
		}
		if err != nil {
			return nil, err
		}
		if p == nil {
			select {
			case <-wait:
				continue
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
		in, err := p.body(ctx)
		switch {
		case err != nil && ctx.Err() == nil && a.ctx.Err() != nil:
			return nil, fmt.Errorf("%w: %w: %w", registry.ErrUnavailable, errShuttingDown, err)
		case isUncached(err):
			return a.relayed(ctx, repo, d, hint)
		case err != nil && ctx.Err() == nil && p.caller != cluster.Authorization(ctx):
			if others++; others > 1 { // callers enough fail, one after the other
				return a.relayed(ctx, repo, d, hint)
			}
			continue
		case err != nil:
			return nil, err
		case in == nil:
			continue
		}
		a.m.misses.Inc()
		return a.watch(in.content(ctx, func() *relay {
			a.m.relayed.Inc()
			return &relay{a: a, ctx: ctx, repo: repo, digest: d, hash: d.Algorithm().Hash()}
		}), hint), nil
	}
}

// content returns what one reader gets of a blob that arrives. Its Close ends the use of in. others makes what goes on
// where the disk has no room for the rest.
func (in *incoming) content(ctx context.Context, others func() *relay) *registry.Content {
	s := newStream(ctx, in, others)
	var once sync.Once
	return &registry.Content{Digest: in.p.digest, Size: in.size, Body: s, Close: func() error {
		once.Do(func() {
			s.close()
			in.leave()
		})
		return nil
	}}
}

// open opens a blob of the cache. A small one of which all is read is verified first.
func (a *Agent) open(ctx context.Context, d digest.Digest, hint registry.Range) (*store.Reader, error) {
	if i, err := a.store.Stat(d); err == nil && i.Size <= heldWhole && hint == registry.Whole {
		return a.store.OpenVerified(ctx, d)
	}
	return a.store.Open(d)
}
