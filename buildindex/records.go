package buildindex

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
)

// errAside is a record that must not, or can't, be adopted; others can.
var errAside = errors.New("set aside")

// errLater is an errAside that may go by itself: what the name is now is not known until then.
var errLater = errors.New("it can't be read now")

// entry is a record at an origin; err says why it can't be believed.
type entry struct {
	origin string
	record cluster.NameRecord
	err    error
}

// round is one look at what origins keep.
type round struct {
	known int64 // the last generation that SQL had when the round began
	heard []string
	adopt []entry
	bytes *sync.Map  // of manifests to adopt, by digest: of all origins of the round
	wait  []recordID // whose changes are queued, until these were counted
	aside []asideRecord

	refusals []entry          // what origins have noted as refused, which is no change
	later    []cluster.Change // of those set aside, what can't be read now
}

func (t *round) setAside(e entry) {
	t.aside = append(t.aside, asideRecord{describe(e.origin, e.record, e.err), cluster.NameKey(e.record)})
}

// eachRecord reads and checks what an origin keeps, and calls fn with each record. Nothing of the list is kept: it may
// have gigabytes. Only a record that holds raises the counter of generations.
func (x *Index) eachRecord(ctx context.Context, o *cluster.Origin, fn func(entry) error) error {
	now := time.Now()
	return o.Names(ctx, func(line []byte) error {
		r, err := cluster.ParseNameRecord(line, x.keys, now)
		if err != nil {
			r.Bytes = nil
		} else {
			x.sawGeneration(r.Generation)
		}
		return fn(entry{o.ID, r, err})
	})
}

// bytesToKeep returns the bytes of a record that is to be adopted, one copy for all origins; nil where SQL has what it
// says.
func (x *Index) bytesToKeep(ctx context.Context, t *round, r cluster.NameRecord) ([]byte, error) {
	if len(r.Bytes) == 0 {
		return nil, nil
	}
	if t.known > 0 { // else SQL is empty
		if known, err := x.known(ctx, r); err != nil || known {
			return nil, err
		}
	}
	kept, _ := t.bytes.LoadOrStore(r.Digest, r.Bytes)
	return kept.([]byte), nil
}

// tombstones are the newest deletions of names. One that policy forbids hides nothing.
func (x *Index) tombstones(entries []entry) cluster.Latest {
	dead := cluster.Latest{}
	for _, e := range entries {
		c := e.record.Change()
		if c.Act != cluster.Delete {
			continue
		}
		if c.Kind == cluster.Tag && x.cfg.immutable(c.Repository, c.Tag) || c.Kind == cluster.Manifest && x.cfg.policy(c.Repository).immutable != nil {
			continue // adopt decides, when it is known what is there
		}
		dead.Add(c)
	}
	return dead
}

// adoptAll takes over, oldest first, the records that SQL does not know, and queues them for the bucket. One that must
// not be adopted is set aside.
func (x *Index) adoptAll(ctx context.Context, t *round, dead cluster.Latest) error {
	slices.SortFunc(t.adopt, func(a, b entry) int {
		return cmp.Or(cmp.Compare(a.record.Generation, b.record.Generation), strings.Compare(cluster.NameKey(a.record), cluster.NameKey(b.record)))
	})
	entries := slices.CompactFunc(slices.Clone(t.adopt), func(a, b entry) bool { // replicas
		return a.record.Generation == b.record.Generation && cluster.NameKey(a.record) == cluster.NameKey(b.record)
	})
	whole := map[digest.Digest][]byte{}
	for _, e := range entries {
		if len(e.record.Bytes) > 0 {
			whole[e.record.Digest] = e.record.Bytes
		}
	}
	last := int64(0)
	for _, e := range entries {
		err := x.adopt(ctx, e.record, dead, whole)
		if errors.Is(err, errLater) {
			if err := x.putOff(ctx, t, e.record); err != nil {
				return err
			}
		}
		if errors.Is(err, errAside) {
			for _, copy := range t.adopt {
				if copy.record.Generation == e.record.Generation && cluster.NameKey(copy.record) == cluster.NameKey(e.record) {
					copy.err = err
					t.setAside(copy)
				}
			}
			continue
		}
		if err != nil {
			return err
		}
		last = e.record.Generation
	}
	if last == 0 {
		return nil
	}
	x.wake()
	// SQL has all changes up to here now, or remembers them as set aside: what origins still keep of others can go.
	return x.db.Update(ctx, func(tx names.Tx) error { return tx.RaiseGeneration(last) })
}

// putOff notes what a record that can't be read now says, but for names of which SQL has something later.
func (x *Index) putOff(ctx context.Context, t *round, r cluster.NameRecord) error {
	for _, c := range r.Changes() {
		at, err := x.changedAt(ctx, c.Name)
		if err != nil {
			return err
		}
		if at < c.Generation {
			t.later = append(t.later, c)
		}
	}
	return nil
}

// adopt takes over one record that was checked, errAside when it must not or can't be.
func (x *Index) adopt(ctx context.Context, r cluster.NameRecord, dead cluster.Latest, whole map[digest.Digest][]byte) error {
	if c := r.Change(); c.Act == cluster.Put {
		changes := r.Changes()
		if dead.Beats(changes[len(changes)-1]) { // the manifest is gone, or the membership
			err := x.adoptGone(ctx, c)
			if err == nil {
				x.unproven.adopted(r)
			}
			return err
		}
		if c.Kind == cluster.Tag && dead.Beats(c) {
			r.Tag = "" // the tag is gone, the manifest is not
		}
	}
	if known, err := x.known(ctx, r); err != nil || known {
		if err == nil {
			x.unproven.adopted(r)
		}
		return err
	}
	var p *parsed
	if r.Change().PutsManifest() {
		var err error
		if r.Bytes, err = x.bytesOf(ctx, r, whole); err != nil {
			return err
		}
		if p, err = parseManifest(r.MediaType, r.Bytes); err != nil {
			return fmt.Errorf("%w: its bytes are no manifest that this program knows: %w", errAside, err)
		}
	}
	if !x.restored.Load() {
		x.unproven.add(r)
	}
	err := x.db.Update(ctx, func(tx names.Tx) error {
		if err := x.adoptIn(tx, r, p); err != nil {
			return err
		}
		return x.enqueue(tx, r)
	})
	if err == nil {
		x.unproven.adopted(r)
	}
	return err
}

// adoptGone takes over what is left of a put whose manifest was deleted since: its tag went with that, and is not what
// the bucket has of it from before.
func (x *Index) adoptGone(ctx context.Context, c cluster.Change) error {
	if c.Kind != cluster.Tag {
		return nil
	}
	return x.db.Update(ctx, func(tx names.Tx) error {
		err := tx.DeleteTag(c.Repository, c.Tag, c.Generation)
		if errors.Is(err, names.ErrNewer) {
			return nil
		}
		return errors.Join(ignoreMissing(err), x.enqueueTags(tx, c.Repository, []names.Tagged{{Tag: c.Tag, Generation: c.Generation}}))
	})
}

// adoptIn writes a record to SQL. What a later generation has changed meanwhile stays. It is errAside for a record that
// moves or deletes an immutable tag, or deletes its manifest.
func (x *Index) adoptIn(tx names.Tx, r cluster.NameRecord, p *parsed) error {
	ref := registry.Reference{Tag: r.Tag, Digest: r.Digest}
	if r.Tag != "" && x.cfg.immutable(r.Repository, r.Tag) {
		keep := names.Condition{Fixed: r.Digest}
		if r.Change().Act == cluster.Delete {
			keep = names.Condition{Absent: true}
		}
		var c *names.Conflict
		if err := tx.Require(r.Repository, ref, keep); errors.As(err, &c) {
			return fmt.Errorf("%w: %w and is %s", errAside, errImmutable(r.Repository, r.Tag), c.Now.Digest)
		} else if err != nil {
			return err
		}
	}
	err := x.write(tx, r, p)
	if errors.Is(err, names.ErrNewer) || errors.Is(err, names.ErrNotFound) {
		return nil
	}
	if errors.Is(err, registry.ErrDenied) {
		return fmt.Errorf("%w: %w", errAside, err)
	}
	return err
}

// write does what a record says. names.ErrNotFound and names.ErrNewer as from names.Tx; registry.ErrDenied for the
// deletion of a manifest that an immutable tag names.
func (x *Index) write(tx names.Tx, r cluster.NameRecord, p *parsed) error {
	switch c := r.Change(); {
	case c.Act == cluster.Put && c.Kind == cluster.Membership:
		return tx.PutLayer(c.Repository, c.Digest, r.Size, c.Generation)
	case c.Act == cluster.Put:
		return x.apply(tx, r, p)
	case c.Kind == cluster.Tag:
		return tx.DeleteTag(c.Repository, c.Tag, c.Generation)
	case c.Kind == cluster.Membership:
		return tx.DeleteLayer(c.Repository, c.Digest, c.Generation)
	}
	return x.applyDeletion(tx, r)
}

// bytesOf finds the bytes of the manifest that a record names: in the record, in another of this round, in SQL or in
// the bucket.
func (x *Index) bytesOf(ctx context.Context, r cluster.NameRecord, whole map[digest.Digest][]byte) ([]byte, error) {
	if b := whole[r.Digest]; b != nil {
		return b, nil
	}
	m, err := x.db.Manifest(ctx, r.Repository, registry.Reference{Digest: r.Digest})
	if err == nil || !errors.Is(err, names.ErrNotFound) {
		return m.Bytes, err
	}
	_, b, ok := x.buckets.For(r.Repository)
	if !ok {
		return nil, fmt.Errorf("%w: no bucket is configured for repository %s", errAside, r.Repository)
	}
	raw, err := readObject(ctx, b, layout.BlobKey(r.Digest), registry.MaxManifest+1)
	if err == nil && r.Digest.Algorithm().FromBytes(raw) != r.Digest {
		err = errors.New("the bucket's bytes are others")
	} else if err != nil && !errors.Is(err, bucket.ErrNotFound) {
		err = fmt.Errorf("%w: %w", errLater, err)
	}
	if err != nil {
		return nil, fmt.Errorf("%w: the manifest that it names is in no record and not in SQL; in the bucket: %w", errAside, err)
	}
	return raw, nil
}

// changedAt returns the generation of the last change of a name that SQL has, a deletion too; 0 where there is none.
func (x *Index) changedAt(ctx context.Context, n cluster.Name) (int64, error) {
	at, err := x.generationOf(ctx, n)
	if err = ignoreMissing(err); err != nil {
		return 0, err
	}
	deleted, err := x.db.Deleted(ctx, n)
	return max(at, deleted), err
}

// known reports whether SQL has what a record says, or something later of every name of it.
func (x *Index) known(ctx context.Context, r cluster.NameRecord) (bool, error) {
	later := true
	for _, c := range r.Changes() {
		at, err := x.changedAt(ctx, c.Name)
		if err != nil {
			return false, err
		}
		later = later && at > c.Generation
	}
	if later {
		return true, nil
	}
	switch c := r.Change(); {
	case c.Act != cluster.Put:
	case c.Kind == cluster.Membership:
		l, err := x.db.Layer(ctx, c.Repository, c.Digest)
		return err == nil && l.Generation >= c.Generation, ignoreMissing(err)
	default:
		m, err := x.db.StatManifest(ctx, r.Repository, r.Digest)
		if err != nil || m.Generation < c.Generation || c.Kind != cluster.Tag {
			return err == nil && m.Generation >= c.Generation, ignoreMissing(err)
		}
		now, err := x.db.Tag(ctx, c.Repository, c.Tag)
		return err == nil && now.Generation >= c.Generation, ignoreMissing(err)
	}
	return false, nil
}
