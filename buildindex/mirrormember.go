package buildindex

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// What a manifest at an upstream says that its repository has is a claim: whoever may push there anything may write any
// digest into it, also that of a blob which he may not read. A claim counts where there is nothing to gain by a wrong
// one, which is where no repository that is not given to everybody has the blob, or a manifest of that digest, whose
// bytes are a blob in the bucket. Else the upstream is asked whether the repository has the blob, once: its answer, a
// proof, is kept.

const (
	// proofPatience is how long an upstream is waited for that is to prove a membership: less than an agent waits for
	// build-index.
	proofPatience = 8 * time.Second
	// holdersPage and maxHolders bound the repositories that are looked at for one claim. One that more have counts as
	// contested, which costs a question.
	holdersPage = 500
	maxHolders  = 10 * holdersPage
)

// errNoProof is a claim that the upstream has to confirm first.
var errNoProof = errors.New("the upstream was not asked whether the repository has the blob")

// known returns a blob that an upstream's repository has, as far as that is known without asking: names.ErrNotFound
// where nothing says so, errNoProof with the size where only a claim does that does not count.
func (mi *mirror) known(ctx context.Context, q question, d digest.Digest) (cluster.Layer, error) {
	l := cluster.Layer{Digest: d}
	if q.up.Import || q.up.WriteBack { // a name of the cluster is no claim: it was pushed, or proved and written back
		own, err := mi.x.layer(ctx, q.repo, d)
		if err == nil {
			l.Size = own.Size
			return l, nil
		}
		if !errors.Is(err, names.ErrNotFound) && !errors.Is(err, registry.ErrUnavailable) {
			return l, err
		}
	}
	m, err := mi.x.db.MirroredLayer(ctx, q.repo, d)
	if err != nil {
		return l, err
	}
	l.Size = m.Size
	if m.Proved {
		mi.use(q.repo, d)
		return l, nil
	}
	contested, err := mi.contested(ctx, q.repo, d)
	if err == nil && contested {
		err = errNoProof
	}
	return l, err
}

// contested reports whether a repository has or claims a blob that is not given to everybody, or may, because names are
// being restored.
func (mi *mirror) contested(ctx context.Context, repo string, d digest.Digest) (bool, error) {
	if !mi.x.restored.Load() {
		return true, nil
	}
	for last, n := "", 0; n < maxHolders; n += holdersPage {
		page, err := mi.x.db.BlobHolders(ctx, d, last, holdersPage)
		if err != nil {
			return false, err
		}
		for _, holder := range page {
			if holder != repo && !mi.forAll(holder) {
				return true, nil
			}
		}
		if len(page) < holdersPage {
			return false, nil
		}
		last = page[len(page)-1]
	}
	return true, nil
}

// forAll reports whether a repository is an upstream's that is given to whoever asks.
func (mi *mirror) forAll(repo string) bool {
	host, remote, ok := cluster.SplitUpstream(repo)
	if !ok {
		return false
	}
	entry, mirrored := mi.set.Public().Match(host)
	return mirrored && entry.Mode(remote) != cluster.ModeCaller
}

// prove asks the upstream whether a repository has a blob, as who asks, keeps that it has, and returns its size. Size
// is what is claimed, negative where nothing is. A registry that the configuration names is believed. One that only a
// pattern takes in may be anybody's, who says so of any digest: it is believed about what no private repository has at
// that time, and else has to send the blob.
func (mi *mirror) prove(ctx context.Context, q question, d digest.Digest, size int64) (int64, error) {
	return askFor(ctx, mi, q, "blob "+d.String(), times{proofPatience, readLimit}, func(ctx context.Context) (int64, error) {
		size := size
		head, cancel := context.WithTimeout(ctx, coldPatience)
		defer cancel()
		said, err := q.up.StatBlob(head, q.remote, d)
		if err != nil {
			return 0, err
		}
		mi.allow(q)
		if said >= 0 {
			size = said
		}
		if !mi.believed(q) {
			contested, err := mi.contested(ctx, q.repo, d)
			if err == nil && contested {
				size, err = mi.read(ctx, q, d, size)
			}
			if err != nil || !contested {
				return size, err
			}
		}
		if size < 0 || mi.x.roomForMore() != nil {
			return size, nil // it is asked again the next time
		}
		err = mi.x.db.Update(ctx, func(tx names.Tx) error { return tx.ProveMirrored(q.repo, names.Member{Digest: d, Size: size}) })
		if err != nil {
			return 0, fmt.Errorf("%w: keep that %s has %s: %w", registry.ErrUnavailable, q.repo, d, mi.x.full(err))
		}
		return size, nil
	})
}

// believed reports whether the configuration names a question's registry, by its host and not by a pattern.
func (mi *mirror) believed(q question) bool {
	entry, ok := mi.set.Public().Match(q.up.Host)
	return ok && !strings.Contains(entry.Registry, "*")
}

// getLayer returns the membership of a blob in an upstream's repository that the caller may read: of what its known
// manifests name, what the upstream has proved, and what was pushed.
func (mi *mirror) getLayer(ctx context.Context, repo string, d digest.Digest) (cluster.Layer, error) {
	q, err := mi.about(ctx, repo)
	if err != nil {
		return cluster.Layer{}, err
	}
	l, err := mi.known(ctx, q, d)
	switch {
	case errors.Is(err, names.ErrNotFound):
		if err := mi.authorize(ctx, q, d); err != nil {
			return l, err
		}
		return l, fmt.Errorf("%w: blob %s of %s", registry.ErrBlobUnknown, d, repo)
	case errors.Is(err, errNoProof):
		l.Size, err = mi.prove(ctx, q, d, l.Size)
	case err == nil:
		err = mi.authorize(ctx, q, d)
	}
	if err != nil {
		return l, fmt.Errorf("blob %s of %s: %w", d, repo, err)
	}
	return l, nil
}

// authorize returns nil when the caller may read the repository, about whom the upstream is asked by a blob.
func (mi *mirror) authorize(ctx context.Context, q question, d digest.Digest) error {
	if mi.mayRead(q) {
		return nil
	}
	_, err := mi.prove(ctx, q, d, -1)
	return err
}

// granted returns nil when the caller may read a blob by way of a repository (GET grant/<digest>). Unlike for getLayer
// it need not be of a manifest that is known here: the upstream is asked.
func (mi *mirror) granted(ctx context.Context, repo string, d digest.Digest) error {
	if !mi.foreign(repo) {
		_, err := mi.x.getLayer(ctx, repo, d)
		return err
	}
	q, err := mi.about(ctx, repo)
	if err != nil {
		return err
	}
	l, err := mi.known(ctx, q, d)
	switch {
	case errors.Is(err, names.ErrNotFound):
		_, err = mi.prove(ctx, q, d, -1)
	case errors.Is(err, errNoProof):
		_, err = mi.prove(ctx, q, d, l.Size)
	case err == nil:
		err = mi.authorize(ctx, q, d)
		if err == nil && q.mode == cluster.ModeCaller && q.up.WriteBack {
			mi.proveForWriteBack(ctx, q, d, l.Size)
		}
	}
	if err != nil {
		return fmt.Errorf("blob %s of %s: %w", d, repo, err)
	}
	return nil
}

// proveForWriteBack has a blob proved by who may read it: nobody else can be asked when it is written back.
func (mi *mirror) proveForWriteBack(ctx context.Context, q question, d digest.Digest, size int64) {
	proved, err := mi.proved(ctx, q.repo, d)
	if err == nil && !proved {
		_, err = mi.prove(ctx, q, d, size)
	}
	if err != nil {
		mi.x.log.Debug("a blob is not proved now, and its image not written back", "repository", q.repo, "digest", d, "error", err)
	}
}

// proved reports whether a repository's blob is a name of the cluster, or its upstream has said that it has it.
func (mi *mirror) proved(ctx context.Context, repo string, d digest.Digest) (bool, error) {
	_, err := mi.x.db.Layer(ctx, repo, d)
	if !errors.Is(err, names.ErrNotFound) {
		return err == nil, err
	}
	l, err := mi.x.db.MirroredLayer(ctx, repo, d)
	if errors.Is(err, names.ErrNotFound) {
		return false, nil
	}
	return l.Proved, err
}

// member returns nil when it is known without asking that a repository has a blob, and that the caller may read it;
// names.ErrNotFound when not.
func (x *Index) member(ctx context.Context, repo string, d digest.Digest) error {
	if !x.mirror.foreign(repo) {
		_, err := x.layer(ctx, repo, d)
		return err
	}
	q, err := x.mirror.about(ctx, repo)
	if err != nil || !x.mirror.mayRead(q) {
		return names.ErrNotFound
	}
	_, err = x.mirror.known(ctx, q, d)
	if errors.Is(err, errNoProof) {
		return names.ErrNotFound
	}
	return err
}

// mountSource returns a membership by which the caller may mount a blob, names.ErrNotFound when there is none. What an
// upstream gives to some alone is none, but for who has a grant.
func (mi *mirror) mountSource(ctx context.Context, d digest.Digest) (names.Layer, error) {
	if !mi.set.Public().Any() {
		return mi.x.db.Layer(ctx, "", d)
	}
	for last, n := "", 0; n < maxHolders; n += holdersPage {
		page, err := mi.x.db.LayerRepositories(ctx, d, last, holdersPage)
		if err != nil {
			return names.Layer{}, err
		}
		for _, repo := range page {
			if mi.mayMountFrom(ctx, repo) {
				return mi.x.db.Layer(ctx, repo, d)
			}
		}
		if len(page) < holdersPage {
			break
		}
		last = page[len(page)-1]
	}
	return names.Layer{}, names.ErrNotFound
}

func (mi *mirror) mayMountFrom(ctx context.Context, repo string) bool {
	if !mi.foreign(repo) || mi.forAll(repo) {
		return true
	}
	q, err := mi.about(ctx, repo)
	return err == nil && mi.mayRead(q)
}
