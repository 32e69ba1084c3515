package buildindex

import (
	"context"
	"errors"
	"fmt"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

// GetManifest reads by tag or digest from SQL.
func (x *Index) GetManifest(ctx context.Context, repo string, ref registry.Reference, o registry.GetOptions) (*registry.Manifest, error) {
	if x.mirror.foreign(repo) {
		return x.mirror.getManifest(ctx, repo, ref, o)
	}
	m, err := x.manifest(ctx, repo, ref)
	if errors.Is(err, names.ErrNotFound) {
		return nil, fmt.Errorf("%w: manifest %s of %s", registry.ErrManifestUnknown, ref, repo)
	}
	if err != nil {
		return nil, fmt.Errorf("get manifest %s of %s: %w", ref, repo, err)
	}
	out := &registry.Manifest{Digest: m.Digest, MediaType: m.MediaType, Bytes: m.Bytes}
	if o.Have == m.Digest {
		out.Bytes = nil
	}
	return out, nil
}

// PutManifest validates a manifest and its references and stores it, with the tag if there is one.
func (x *Index) PutManifest(ctx context.Context, repo string, ref registry.Reference, mediaType string, raw []byte, o registry.PutOptions) (registry.PutResult, error) {
	if err := x.mayPush(repo); err != nil {
		return registry.PutResult{}, err
	}
	p, err := parseManifest(mediaType, raw)
	if err == nil {
		err = p.bounded()
	}
	if err == nil {
		err = x.roomForMore()
	}
	if err != nil {
		return registry.PutResult{}, err
	}
	d := ref.Digest
	if d == "" {
		d = digest.FromBytes(raw)
	} else if d.Algorithm().FromBytes(raw) != d {
		return registry.PutResult{}, fmt.Errorf("%w: the manifest is %s, not %s", registry.ErrDigestInvalid, d.Algorithm().FromBytes(raw), d)
	}
	if !x.cfg.lax(repo) {
		if err := x.checkReferences(ctx, repo, p); err != nil {
			return registry.PutResult{}, err
		}
	}
	tags := o.Tags
	if ref.Tag != "" {
		tags = []string{ref.Tag}
	}
	unlock, err := x.lock(ctx, repo, append(tags, d.String())...)
	if err != nil {
		return registry.PutResult{}, err
	}
	defer unlock()
	needs, err := x.needs(ctx, repo, tags, d, o)
	if err != nil {
		return registry.PutResult{}, fmt.Errorf("put manifest %s of %s: %w", ref, repo, err)
	}
	if err := x.store(ctx, push{repo, tags, d, p, raw, needs}); err != nil {
		return registry.PutResult{}, fmt.Errorf("put manifest %s of %s: %w", ref, repo, err)
	}
	x.m.pushed.Inc()
	return registry.PutResult{Digest: d, Subject: p.subject, Tags: o.Tags}, nil
}

// push is a manifest that is put, with tags or without.
type push struct {
	repo  string
	tags  []string
	d     digest.Digest
	p     *parsed
	raw   []byte
	needs []need // conditions, looked at inside the write
}

// store makes a manifest and its tags durable. The caller holds the lock of all of them.
func (x *Index) store(ctx context.Context, m push) error {
	rs, err := x.manifestRecords(m.repo, m.tags, m.d, m.p.mediaType, m.raw)
	if err != nil {
		return err
	}
	return x.change(ctx, rs, func(tx names.Tx) error {
		for _, n := range m.needs {
			if err := tx.Require(m.repo, n.ref, n.is); err != nil {
				return err
			}
		}
		for _, r := range rs {
			r.Bytes = m.raw
			if err := x.apply(tx, r, m.p); err != nil {
				return err
			}
		}
		return nil
	})
}

// manifestRecords are the records of a push: one for each tag, or one. The first has the bytes, the others name them.
func (x *Index) manifestRecords(repo string, tags []string, d digest.Digest, mediaType string, raw []byte) (rs []cluster.NameRecord, err error) {
	if len(tags) == 0 {
		tags = []string{""}
	}
	for i, tag := range tags {
		c := cluster.PutName(cluster.ManifestName(repo, d))
		if tag != "" {
			c = cluster.PutTag(repo, tag, d)
		}
		r, err := x.record(c)
		if err != nil {
			return nil, err
		}
		r.MediaType, r.Size = mediaType, int64(len(raw))
		if i == 0 {
			r.Bytes = raw
		} else {
			r.Version = cluster.NameRef
		}
		rs = append(rs, r)
	}
	return rs, nil
}

// need is a condition of a push: of a tag that it sets, or of the manifest.
type need struct {
	ref registry.Reference
	is  names.Condition
}

// needs returns the conditions of a push, those of the request and of tags that must not move, and looks at them a
// first time: most pushes that are refused then leave no record. The write looks again.
func (x *Index) needs(ctx context.Context, repo string, tags []string, d digest.Digest, o registry.PutOptions) (all []need, err error) {
	asked := names.Condition{Exists: o.IfExists, Absent: o.IfAbsent, OneOf: o.IfMatch, NoneOf: o.IfNoneMatch}
	for _, tag := range tags {
		n := need{registry.Reference{Tag: tag}, asked}
		if o.KeepTags || x.cfg.immutable(repo, tag) {
			n.is.Fixed = d
		}
		if o.Conditional() || n.is.Fixed != "" {
			all = append(all, n)
		}
	}
	if len(tags) == 0 && o.Conditional() {
		all = []need{{registry.Reference{Digest: d}, asked}}
	}
	for _, n := range all {
		now, err := x.now(ctx, repo, n.ref)
		if err == nil && !n.is.Holds(now.Digest) {
			err = refused(&names.Conflict{Kind: names.ErrCondition, Repository: repo, Name: n.ref, Wanted: n.is, Now: now})
		}
		if err != nil {
			return nil, err
		}
	}
	return all, nil
}

// now returns what a tag or a digest is, a zero Version when it is not there.
func (x *Index) now(ctx context.Context, repo string, ref registry.Reference) (names.Version, error) {
	if ref.Tag != "" {
		v, err := x.tag(ctx, repo, ref.Tag)
		return v, ignoreMissing(err)
	}
	m, err := x.stat(ctx, repo, ref.Digest)
	if err != nil {
		return names.Version{}, ignoreMissing(err)
	}
	return names.Version{Digest: m.Digest, Generation: m.Generation}, nil
}

// hasManifest reports whether SQL has a manifest of a repository.
func (x *Index) hasManifest(ctx context.Context, repo string, d digest.Digest) (bool, error) {
	_, err := x.db.StatManifest(ctx, repo, d)
	return err == nil, ignoreMissing(err)
}

// refused returns what a client is told whose condition does not hold (RFC 9110 section 13.2.2), or who would move an
// immutable tag.
func refused(c *names.Conflict) error {
	name := c.Repository + "@" + c.Name.String()
	if c.Name.Tag != "" {
		name = c.Repository + ":" + c.Name.Tag
	}
	fixed := c.Wanted.Fixed
	c.Wanted.Fixed = ""
	switch {
	case c.Wanted.Holds(c.Now.Digest) && fixed != "": // the proxy that asked for KeepTags says so itself
		return fmt.Errorf("%w and is %s: push another tag", errImmutable(c.Repository, c.Name.Tag), c.Now.Digest)
	case c.Now.Digest == "":
		return fmt.Errorf("%w: %s does not exist", registry.ErrPrecondition, name)
	case c.Wanted.Absent:
		return fmt.Errorf("%w: %s exists, it is %s", registry.ErrPrecondition, name, c.Now.Digest)
	}
	return fmt.Errorf("%w: %s is %s now", registry.ErrPrecondition, name, c.Now.Digest)
}

// errImmutable returns the ErrDenied of a change to an immutable tag.
func errImmutable(repo, tag string) error {
	return fmt.Errorf("%w: tag %s of %s is immutable by this registry's configuration", registry.ErrDenied, tag, repo)
}

func ignoreMissing(err error) error {
	if errors.Is(err, names.ErrNotFound) {
		return nil
	}
	return err
}

// DeleteManifest removes a tag, or a manifest with its tags.
func (x *Index) DeleteManifest(ctx context.Context, repo string, ref registry.Reference) error {
	if err := x.mayPush(repo); err != nil {
		return err
	}
	unlock, err := x.lock(ctx, repo, ref.String())
	if err != nil {
		return err
	}
	defer unlock()
	// Look first: a record for what is not there would be for nothing.
	now, err := x.now(ctx, repo, ref)
	if err == nil && now.Digest == "" {
		err = names.ErrNotFound
	}
	if errors.Is(err, names.ErrNotFound) {
		return fmt.Errorf("%w: manifest %s of %s", registry.ErrManifestUnknown, ref, repo)
	}
	if err != nil {
		return fmt.Errorf("delete %s of %s: %w", ref, repo, err)
	}
	if err := x.mayDelete(ctx, repo, ref); err != nil {
		return err
	}
	name := cluster.ManifestName(repo, ref.Digest)
	if ref.Tag != "" {
		name = cluster.TagName(repo, ref.Tag)
	}
	r, err := x.record(cluster.DeleteName(name))
	if err != nil {
		return fmt.Errorf("delete %s of %s: %w", ref, repo, err)
	}
	err = x.change(ctx, []cluster.NameRecord{r}, func(tx names.Tx) error {
		if ref.Tag != "" {
			return tx.DeleteTag(repo, ref.Tag, r.Generation)
		}
		return x.applyDeletion(tx, r)
	})
	if errors.Is(err, names.ErrNotFound) {
		return fmt.Errorf("%w: manifest %s of %s", registry.ErrManifestUnknown, ref, repo)
	}
	if err != nil {
		return fmt.Errorf("delete %s of %s: %w", ref, repo, err)
	}
	return nil
}

// noneImmutable returns ErrDenied when one of the tags is immutable.
func (x *Index) noneImmutable(repo string, tags []string) error {
	for _, tag := range tags {
		if x.cfg.immutable(repo, tag) {
			return errImmutable(repo, tag)
		}
	}
	return nil
}

// mayDelete refuses to delete an immutable tag, or the manifest that it names, before there is a record of it. The
// write looks again at what tags the manifest has.
func (x *Index) mayDelete(ctx context.Context, repo string, ref registry.Reference) error {
	tags := []string{ref.Tag}
	if ref.Tag == "" && x.cfg.policy(repo).immutable != nil {
		err := x.requireComplete(repo, "tags of "+ref.String())
		if err != nil {
			return err
		}
		if tags, err = x.db.TagsOf(ctx, repo, ref.Digest); err != nil {
			return fmt.Errorf("delete %s of %s: %w", ref, repo, err)
		}
	}
	return x.noneImmutable(repo, tags)
}
