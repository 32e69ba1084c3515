package buildindex

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/registry"
)

// tag returns what a tag of an upstream is. The warning says that it may have moved since: the upstream can't be asked.
func (mi *mirror) tag(ctx context.Context, q question, tag string) (d digest.Digest, warning string, err error) {
	last, err := mi.last(ctx, q.repo, tag)
	known := err == nil
	if err != nil && !errors.Is(err, names.ErrNotFound) {
		return "", "", err
	}
	age := time.Since(last.Checked)
	if known && q.granted && q.fresh(last.Checked) {
		mi.m.answered(q, answerFresh)
		return last.Digest, "", nil
	}
	stale := known && q.granted && age < time.Duration(q.up.StaleFor)
	patience := coldPatience
	if stale {
		patience = time.Duration(q.up.Patience)
	}
	err = mi.ask(ctx, q, tag, patience, func(ctx context.Context) error { return mi.askTag(ctx, q, tag) })
	if err == nil {
		if last, err = mi.last(ctx, q.repo, tag); err == nil {
			mi.m.answered(q, answerAsked)
			return last.Digest, "", nil
		}
	}
	if errors.Is(err, registry.ErrManifestUnknown) && mi.mayRead(q) { // to others a private repository is 404 as well
		if v, oerr := mi.own(ctx, q.repo, tag); oerr == nil {
			return v.Digest, "", nil // imported, and not of the upstream
		}
	}
	if !stale || !errors.Is(err, registry.ErrUnavailable) {
		mi.m.failed(q, err)
		return "", "", err
	}
	mi.m.answered(q, answerStale)
	mi.x.log.Debug("an upstream can't be asked: the last known answer is served", "repository", q.repo, "tag", tag, "age", age, "error", err)
	return last.Digest, fmt.Sprintf(`110 - "%s can't be asked now: this is its answer of %s ago"`, q.up.Host, age.Round(time.Second)), nil
}

// last returns the last known answer about a tag, ErrNotFound when there is none: the upstream's, or, where that is
// younger, what was imported or written back.
func (mi *mirror) last(ctx context.Context, repo, tag string) (tagState, error) {
	key := tagName{repo, tag}
	s, ok := mi.tags.get(key)
	if !ok {
		t, err := mi.x.db.MirroredTag(ctx, repo, tag)
		if err != nil && !errors.Is(err, names.ErrNotFound) {
			return s, err
		}
		if err == nil {
			s, ok = tagState{t, t.Checked}, true
			mi.tags.put(key, s, 0)
		}
	}
	own, err := mi.own(ctx, repo, tag)
	switch at := time.UnixMicro(own.Generation); {
	case err == nil && (!ok || at.After(s.Checked) && own.Digest != s.Digest): // of the same it is the write-back
		return tagState{MirroredTag: names.MirroredTag{Digest: own.Digest, Checked: at}}, nil
	case ok:
		return s, nil
	}
	return s, err
}

// own returns what a tag of the registry is that was pushed to the cluster, or written back: ErrNotFound where the
// configuration allows neither, so that nothing that was pushed before a registry was mirrored stands for it.
func (mi *mirror) own(ctx context.Context, repo, tag string) (names.Version, error) {
	up, _, ok := mi.set.For(repo)
	if !ok || !up.Import && !up.WriteBack {
		return names.Version{}, names.ErrNotFound
	}
	v, err := mi.x.tag(ctx, repo, tag)
	if errors.Is(err, registry.ErrUnavailable) {
		err = names.ErrNotFound // being restored: the upstream knows
	}
	return v, err
}

// askTag asks the upstream what a tag is: by HEAD where something is known, and reads the manifest where it is another
// one. Who asked before may have had the answer meanwhile.
func (mi *mirror) askTag(ctx context.Context, q question, tag string) error {
	ref := registry.Reference{Tag: tag}
	last, err := mi.last(ctx, q.repo, tag)
	if err != nil && !errors.Is(err, names.ErrNotFound) {
		return err
	}
	if err == nil && mi.mayRead(q) && q.fresh(last.Checked) {
		return nil
	}
	if last.Digest == "" {
		_, err := mi.fetch(ctx, q, ref)
		return mi.told(ctx, q, tag, err)
	}
	desc, err := q.up.Head(ctx, q.remote, ref)
	if err != nil {
		return mi.told(ctx, q, tag, err)
	}
	if _, err := mi.local(ctx, q.repo, desc.Digest); errors.Is(err, names.ErrNotFound) {
		_, err := mi.fetch(ctx, q, registry.Reference{Digest: desc.Digest})
		if errors.Is(err, registry.ErrManifestUnknown) {
			return fmt.Errorf("%w: %s says that %s of %s is %s, and does not have that", registry.ErrUnavailable, q.up.Host, tag, q.remote, desc.Digest)
		}
		if err != nil {
			return mi.told(ctx, q, tag, err)
		}
	} else if err != nil {
		return err
	}
	return mi.told(ctx, q, tag, mi.checked(ctx, q, tag, desc.Digest, last))
}

// told notes what an upstream's answer about a tag means: a grant, or that the tag is gone.
func (mi *mirror) told(ctx context.Context, q question, tag string, err error) error {
	switch {
	case err == nil:
		mi.allow(q)
	case errors.Is(err, registry.ErrManifestUnknown) && q.granted:
		mi.tags.drop(tagName{q.repo, tag})
		if derr := mi.x.db.Update(ctx, func(tx names.Tx) error { return tx.DeleteMirroredTag(q.repo, tag) }); derr != nil {
			return fmt.Errorf("%w: forget %s of %s: %w", registry.ErrUnavailable, tag, q.repo, derr)
		}
	}
	return err
}

// checked notes that the upstream has said what a tag is now. SQL is written where it is another manifest than before,
// and when what it says has become old: after a restart a tag that was checked is checked once more.
func (mi *mirror) checked(ctx context.Context, q question, tag string, d digest.Digest, last tagState) error {
	now := names.MirroredTag{Digest: d, Checked: time.Now()}
	s := tagState{now, last.saved}
	if d != last.Digest || now.Checked.Sub(last.saved) > saveEach {
		if err := mi.x.db.Update(ctx, func(tx names.Tx) error { return tx.PutMirroredTag(q.repo, tag, now) }); err != nil {
			return fmt.Errorf("%w: keep %s of %s: %w", registry.ErrUnavailable, tag, q.repo, mi.x.full(err))
		}
		s.saved = now.Checked
	}
	mi.tags.put(tagName{q.repo, tag}, s, 0)
	return nil
}

// saveEach is how old the time of the last check in SQL gets before it is written again.
const saveEach = 10 * time.Minute
