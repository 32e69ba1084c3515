package buildindex

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// Names of an upstream with write_back become names of the cluster, with generations, records and the outbox, when the
// bucket has what they refer to: an image when it has the image's blobs, which origins write back when they are pulled,
// an index when one of its images is written. What is never pulled is never written.

// writeBackEach is the time between two looks for names that can be written back.
const writeBackEach = 30 * time.Second

// writeBackPage is how many names are looked at in one query.
const writeBackPage = 500

// keep writes names back and prunes until ctx is done.
func (mi *mirror) keep(ctx context.Context) error {
	if !mi.set.Public().Any() {
		return nil
	}
	t := time.NewTicker(writeBackEach)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if !mi.x.begunTenure() {
			continue
		}
		if err := mi.prune(ctx, int64(mi.x.cfg.Upstreams.NamesCapacity)); err != nil && ctx.Err() == nil {
			mi.x.log.Warn("what is mirrored is not pruned now", "error", err)
		}
		if !mi.set.WritesBack() || !mi.x.restored.Load() {
			continue
		}
		if err := mi.writeBack(ctx); err != nil && ctx.Err() == nil {
			mi.x.log.Warn("names of upstreams are not written back now", "error", err)
		}
	}
}

// writeBack makes names of the cluster of all that can be. Images come before the indexes that list them.
func (mi *mirror) writeBack(ctx context.Context) error {
	var last cluster.Name
	var indexes []cluster.Name
	for {
		page, err := mi.x.db.MirroredUnwritten(ctx, last, writeBackPage)
		if err != nil {
			return err
		}
		for _, n := range page {
			index, err := mi.writeManifest(ctx, n, false)
			if err != nil {
				return fmt.Errorf("write back %s: %w", n, err)
			}
			if index {
				indexes = append(indexes, n)
			}
		}
		if len(page) < writeBackPage {
			break
		}
		last = page[len(page)-1]
	}
	for _, n := range indexes {
		if _, err := mi.writeManifest(ctx, n, true); err != nil {
			return fmt.Errorf("write back %s: %w", n, err)
		}
	}
	return mi.writeTags(ctx)
}

// writeManifest makes a name of the cluster of a manifest whose blobs the bucket has. An index is put off for a later
// call with indexes.
func (mi *mirror) writeManifest(ctx context.Context, n cluster.Name, indexes bool) (putOff bool, err error) {
	if up, _, ok := mi.set.For(n.Repository); !ok || !up.WriteBack {
		return false, nil
	}
	m, err := mi.x.db.MirroredManifest(ctx, n.Repository, n.Digest)
	if err != nil {
		return false, ignoreMissing(err)
	}
	p, err := parseManifest(m.MediaType, m.Bytes)
	if err != nil {
		return false, nil // of a version that read others
	}
	if p.children != nil && !indexes {
		return true, nil
	}
	ready, err := mi.ready(ctx, n.Repository, p)
	if err != nil || !ready {
		return false, err
	}
	sizes := map[digest.Digest]int64{}
	for _, s := range p.sizes {
		sizes[s.Digest] = s.Size
	}
	for _, d := range p.blobs {
		if err := mi.x.addLayer(ctx, n.Repository, cluster.Layer{Digest: d, Size: sizes[d]}); err != nil {
			return false, err
		}
	}
	unlock, err := mi.x.lock(ctx, n.Repository, n.Digest.String())
	if err != nil {
		return false, err
	}
	defer unlock()
	return false, mi.x.store(ctx, push{repo: n.Repository, d: n.Digest, p: p, raw: m.Bytes})
}

// ready reports whether the bucket has what a manifest needs: an image's blobs, or of an index one child.
func (mi *mirror) ready(ctx context.Context, repo string, p *parsed) (bool, error) {
	if p.children != nil {
		for _, d := range append(p.manifests, p.either...) {
			if there, err := mi.x.hasManifest(ctx, repo, d); there || err != nil {
				return there, err
			}
		}
		return len(p.children) == 0, nil
	}
	known, err := mi.x.durable(ctx, repo, p.blobs)
	if err != nil {
		return false, err
	}
	for _, d := range p.blobs {
		if !known[d] {
			return false, nil
		}
	}
	return mi.allProved(ctx, repo, p.sizes)
}

// allProved reports whether the upstream has said that a repository has some blobs: what is written back is a name of
// the cluster, and no claim. It is asked, but for what is private to who may read it.
func (mi *mirror) allProved(ctx context.Context, repo string, blobs []names.Member) (bool, error) {
	for _, b := range blobs {
		proved, err := mi.proved(ctx, repo, b.Digest)
		if err != nil {
			return false, err
		}
		if proved {
			continue
		}
		q, err := mi.about(ctx, repo)
		if err == nil {
			_, err = mi.prove(ctx, q, b.Digest, b.Size)
		}
		if err != nil {
			mi.x.log.Debug("an image is not written back now: its upstream does not prove a blob", "repository", repo, "digest", b.Digest, "error", err)
			return false, nil
		}
	}
	return true, nil
}

// writeTags makes tags of the cluster of those whose manifests are the cluster's, unless somebody has pushed the tag
// since. Those that stay as they are, of other registries or by policy, keep none behind them.
func (mi *mirror) writeTags(ctx context.Context) error {
	var last cluster.Name
	for {
		page, err := mi.x.db.MirroredTagsUnwritten(ctx, last, writeBackPage)
		if err != nil {
			return err
		}
		for _, n := range page {
			err := mi.writeTag(ctx, n)
			if errors.Is(err, registry.ErrDenied) {
				mi.x.log.Debug("a tag is not written back", "repository", n.Repository, "tag", n.Tag, "error", err)
				continue
			}
			if err != nil {
				return fmt.Errorf("write back %s: %w", n, err)
			}
		}
		if len(page) < writeBackPage {
			return nil
		}
		last = page[len(page)-1]
	}
}

// writeTag makes a tag of the cluster of one, if its registry's are written back, and nobody has pushed it since.
func (mi *mirror) writeTag(ctx context.Context, n cluster.Name) error {
	if up, _, ok := mi.set.For(n.Repository); !ok || !up.WriteBack {
		return nil
	}
	last, err := mi.last(ctx, n.Repository, n.Tag)
	if err != nil || last.saved.IsZero() { // the cluster's own tag is younger
		return nil
	}
	m, err := mi.x.db.Manifest(ctx, n.Repository, registry.Reference{Digest: last.Digest})
	if err != nil {
		return ignoreMissing(err)
	}
	p, err := parseManifest(m.MediaType, m.Bytes)
	if err != nil {
		return nil // of a version that read others
	}
	tags := []string{n.Tag}
	unlock, err := mi.x.lock(ctx, n.Repository, n.Tag, m.Digest.String())
	if err != nil {
		return err
	}
	defer unlock()
	needs, err := mi.x.needs(ctx, n.Repository, tags, m.Digest, registry.PutOptions{})
	if err != nil {
		return err
	}
	return mi.x.store(ctx, push{n.Repository, tags, m.Digest, p, m.Bytes, needs})
}

// Of manifests that are read each day SQL is told so once.
const (
	useEach    = 24 * time.Hour
	prunePage  = 100
	maxUsed    = 1 << 16
	maxUnsaved = 1 << 12
)

// use notes that a mirrored manifest, a list of its referrers or the proof of a blob was read. Where too many wait to
// be told of, the next use is.
func (mi *mirror) use(repo string, d digest.Digest) {
	n := cluster.ManifestName(repo, d)
	if _, told := mi.used.get(n); told {
		return
	}
	mi.mu.Lock()
	defer mi.mu.Unlock()
	if len(mi.unsaved) < maxUnsaved {
		mi.unsaved[n] = struct{}{}
	}
}

// tell tells SQL what was used. What it could not be told of is told the next time.
func (mi *mirror) tell(ctx context.Context) error {
	mi.mu.Lock()
	used := slices.Collect(maps.Keys(mi.unsaved))
	mi.mu.Unlock()
	if len(used) == 0 {
		return nil
	}
	now := time.Now()
	err := mi.x.db.Update(ctx, func(tx names.Tx) error {
		for _, n := range used {
			if err := tx.UseMirrored(n.Repository, n.Digest, now); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	for _, n := range used {
		mi.used.put(n, struct{}{}, useEach)
	}
	mi.mu.Lock()
	defer mi.mu.Unlock()
	for _, n := range used {
		delete(mi.unsaved, n)
	}
	return nil
}

// prune tells SQL what was used, and forgets what was used least recently until there are no more than capacity bytes.
func (mi *mirror) prune(ctx context.Context, capacity int64) error {
	if err := mi.tell(ctx); err != nil {
		return err
	}
	for {
		n, err := mi.x.db.MirroredBytes(ctx)
		if err != nil || n <= capacity {
			return err
		}
		err = mi.x.db.Update(ctx, func(tx names.Tx) error {
			_, err := tx.PruneMirrored(prunePage)
			return err
		})
		if err != nil {
			return err
		}
		mi.tags.clear() // SQL says which are left
	}
}
