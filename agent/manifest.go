package agent

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"kraken/origin/store"
	"kraken/proto/registry"
)

// resolution is the last known digest of a tag. It is kept on disk, so that a restarted agent still pulls by tag while
// build-index is unreachable.
type resolution struct {
	Repository string        `json:"repository"`
	Tag        string        `json:"tag"`
	Digest     digest.Digest `json:"digest"`
	MediaType  string        `json:"media_type"`
	Time       time.Time     `json:"time"` // when build-index last confirmed it
}

// GetManifest asks build-index on every pull by tag, and for a digest once in a while. When build-index is unreachable
// (not when it says 404, nor when it is slow) the last known answer of bounded age is given, with a warning.
func (a *Agent) GetManifest(ctx context.Context, repo string, ref registry.Reference, o registry.GetOptions) (*registry.Manifest, error) {
	key := repo + "@" + ref.String() + a.callerOf(ctx, repo)
	v, err, _ := a.resolve.Do(key, func() (any, error) {
		// The flight belongs to all its askers: it doesn't end when the first one goes away.
		ctx := context.WithoutCancel(ctx)
		if ref.Tag != "" {
			return a.byTag(ctx, repo, ref)
		}
		return a.byDigest(ctx, repo, ref.Digest)
	})
	if err != nil {
		return nil, err
	}
	m := *v.(*registry.Manifest)
	if o.Have == m.Digest {
		m.Bytes = nil
	}
	return &m, nil
}

func (a *Agent) byTag(ctx context.Context, repo string, ref registry.Reference) (*registry.Manifest, error) {
	last, known := a.lastResolution(repo, ref.Tag)
	var have []byte
	if known {
		have = a.cachedManifest(last.Digest)
	}
	o := registry.GetOptions{}
	if have != nil {
		o.Have = last.Digest
	}
	m, err, unreachable := a.askManifest(ctx, repo, ref, o)
	switch {
	case err == nil:
		if m.Bytes == nil {
			m.Bytes, m.MediaType = have, last.MediaType
		}
		if err := a.keepManifest(m); err != nil {
			return nil, err
		}
		a.noteGrant(ctx, repo)
		a.manifests.add(memberKey(repo, m.Digest, ""))
		caller := a.callerOf(ctx, repo)
		a.checked.Set(repo+"@"+m.Digest.String()+caller, m.MediaType, a.memberFor(caller))
		if !known || last.Digest != m.Digest || time.Since(last.Time) > time.Minute {
			a.rememberResolution(resolution{repo, ref.Tag, m.Digest, m.MediaType, time.Now().UTC()})
		}
		return m, nil
	case unreachable == nil:
		if known && errors.Is(err, registry.ErrManifestUnknown) {
			a.forgetResolution(last)
		}
		return nil, err
	case have == nil:
		return nil, err
	}
	if age := time.Since(last.Time); age > time.Duration(a.cfg.StaleTags) {
		return nil, fmt.Errorf("%w; the last known digest of %s:%s is %s old, more than stale_tags allows", err, repo, ref.Tag, age.Round(time.Second))
	}
	if err := a.mayReadStale(ctx, repo); err != nil {
		return nil, err
	}
	a.m.stale.Inc()
	a.log.Warn("build-index is unreachable, serving the last known digest of a tag", "repository", repo, "tag", ref.Tag, "digest", last.Digest, "confirmed", last.Time, "error", err)
	return &registry.Manifest{Digest: last.Digest, MediaType: last.MediaType, Bytes: have, Warning: staleWarning(unreachable)}, nil
}

// askManifest asks build-index. unreachable is why it counts as such, nil when it has answered, be it with an error.
func (a *Agent) askManifest(ctx context.Context, repo string, ref registry.Reference, o registry.GetOptions) (m *registry.Manifest, err, unreachable error) {
	err, unreachable = a.indexHealth.ask(ctx, func(ctx context.Context) (err error) {
		m, err = a.index.GetManifest(ctx, repo, ref, o)
		return err
	})
	return m, err, unreachable
}

func (a *Agent) byDigest(ctx context.Context, repo string, d digest.Digest) (*registry.Manifest, error) {
	have := a.cachedManifest(d)
	caller := a.callerOf(ctx, repo)
	key := repo + "@" + d.String() + caller
	if mt := a.checked.Get(key); mt != nil && have != nil {
		return &registry.Manifest{Digest: d, MediaType: mt.Value(), Bytes: have}, nil
	}
	o := registry.GetOptions{}
	if have != nil {
		o.Have = d
	}
	m, err, unreachable := a.askManifest(ctx, repo, registry.Reference{Digest: d}, o)
	if err == nil {
		if m.Bytes == nil {
			m.Bytes = have
		}
		if m.MediaType == "" {
			m.MediaType = registry.SniffMediaType(m.Bytes)
		}
		if err := a.keepManifest(m); err != nil {
			return nil, err
		}
		a.noteGrant(ctx, repo)
		a.manifests.add(memberKey(repo, d, ""))
		a.checked.Set(key, m.MediaType, a.memberFor(caller))
		return m, nil
	}
	if unreachable == nil {
		a.checked.Delete(key)
		if errors.Is(err, registry.ErrManifestUnknown) {
			a.manifests.seen.Remove(memberKey(repo, d, ""))
		}
		return nil, err
	}
	if err := a.checkStaleManifest(ctx, repo, d); err != nil {
		return nil, err
	}
	if have == nil {
		// A manifest is an ordinary blob in the bucket, which the origins read through. Its digest vouches for it.
		raw, ferr := a.manifestFromOrigins(ctx, repo, d)
		if ferr != nil {
			return nil, fmt.Errorf("%w; and origins: %w", err, ferr)
		}
		have = raw
	}
	a.m.stale.Inc()
	return &registry.Manifest{Digest: d, MediaType: registry.SniffMediaType(have), Bytes: have, Warning: staleWarning(unreachable)}, nil
}

func (a *Agent) manifestFromOrigins(ctx context.Context, repo string, d digest.Digest) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, metainfoBudget)
	defer cancel()
	raw, suspects, err := a.readManifest(ctx, repo, d, nil)
	a.tell(repo, d, suspects...)
	if len(suspects) > 0 && len(a.originsBut(d, suspects)) > 0 {
		raw, _, err = a.readManifest(ctx, repo, d, suspects)
	}
	if err != nil {
		return nil, err
	}
	return raw, a.keepManifest(&registry.Manifest{Digest: d, Bytes: raw})
}

// readManifest also says which origins are to blame where the bytes are others.
func (a *Agent) readManifest(ctx context.Context, repo string, d digest.Digest, wrong []string) (raw []byte, suspects []string, err error) {
	r := a.newHTTPSource(ctx, repo, d, wrong)
	defer r.Close()
	if err := r.open(); err != nil {
		return nil, nil, err
	}
	if r.size > registry.MaxManifest {
		return nil, nil, fmt.Errorf("%w: %s has %d bytes, which is no manifest", registry.ErrManifestUnknown, d, r.size)
	}
	raw, err = io.ReadAll(io.LimitReader(r, registry.MaxManifest))
	if err != nil {
		err = fmt.Errorf("read manifest %s from an origin: %w", d, err)
	} else if d.Algorithm().FromBytes(raw) != d {
		err = fmt.Errorf("%w: an origin sent other bytes for %s: %w", registry.ErrUnavailable, d, store.ErrDigestMismatch)
	}
	return raw, r.suspects(err), err
}

// cachedManifest returns the bytes of a manifest in the cache, nil when it is not there, or was rotten and is gone now.
func (a *Agent) cachedManifest(d digest.Digest) []byte {
	if info, err := a.store.Stat(d); err != nil || info.Size > registry.MaxManifest {
		return nil
	}
	r, err := a.store.OpenVerified(a.ctx, d)
	if err != nil {
		return nil
	}
	defer r.Close()
	raw, err := io.ReadAll(io.LimitReader(r.File(), registry.MaxManifest))
	if err != nil {
		a.log.Warn("a cached manifest can't be read", "digest", d, "error", err)
		return nil
	}
	return raw
}

// keepManifest puts a manifest into the cache and learns from it how large its blobs are.
func (a *Agent) keepManifest(m *registry.Manifest) error {
	if m.Digest.Algorithm().FromBytes(m.Bytes) != m.Digest {
		return fmt.Errorf("%w: build-index sent other bytes for manifest %s", registry.ErrUnavailable, m.Digest)
	}
	a.learnSizes(m.Bytes)
	if _, err := a.store.Stat(m.Digest); err == nil {
		return nil
	}
	if _, err := a.store.Ingest(a.ctx, m.Digest, int64(len(m.Bytes)), bytes.NewReader(m.Bytes), nil); err != nil && !errors.Is(err, store.ErrBusy) {
		a.log.Warn("a manifest was not cached", "digest", m.Digest, "error", err)
	}
	return nil
}

// learnSizes spares a pull of a small blob the question to the tracker.
func (a *Agent) learnSizes(raw []byte) {
	var doc struct {
		Config *v1.Descriptor  `json:"config"`
		Layers []v1.Descriptor `json:"layers"`
	}
	if json.Unmarshal(raw, &doc) != nil {
		return // some other media type; sizes are only a hint
	}
	if doc.Config != nil {
		a.sizes.Add(doc.Config.Digest, doc.Config.Size)
	}
	for _, l := range doc.Layers {
		a.sizes.Add(l.Digest, l.Size)
	}
}

func resolutionKey(repo, tag string) string {
	sum := sha256.Sum256([]byte(repo + "\x00" + tag))
	return hex.EncodeToString(sum[:])
}

func (a *Agent) lastResolution(repo, tag string) (resolution, bool) {
	var r resolution
	b, err := a.store.Name(resolutionKey(repo, tag))
	if err != nil || json.Unmarshal(b, &r) != nil || r.Repository != repo || r.Tag != tag {
		return resolution{}, false
	}
	return r, true
}

func (a *Agent) rememberResolution(r resolution) {
	b, err := json.Marshal(r)
	if err == nil {
		err = a.store.PutName(resolutionKey(r.Repository, r.Tag), b)
	}
	if err != nil {
		a.log.Warn("a tag's digest was not remembered", "repository", r.Repository, "tag", r.Tag, "error", err)
	}
}

func (a *Agent) forgetResolution(r resolution) {
	if err := a.store.DeleteName(resolutionKey(r.Repository, r.Tag)); err != nil {
		a.log.Warn("a deleted tag is still remembered", "repository", r.Repository, "tag", r.Tag, "error", err)
	}
}
