package buildindex

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"kraken/buildindex/names"
	"kraken/origin/bucket"
	"kraken/proto/cluster"
	"kraken/proto/layout"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

var errNotDurable = errors.New("the bucket lacks what the name refers to")

// unrecorded is the version of a queued change of which origins keep no record.
const unrecorded = 0

// batch is some rows of a lane that are worked on together: what they refer to is asked for in one question.
type batch struct {
	lane *lane
	rows []names.OutboxRow

	durable     map[digest.Digest]bool
	owed        map[digest.Digest]bool // by any origin, which may write a link of it
	unreachable error                  // origins could not be asked about some of it
	revisions   once                   // a manifest is written once for all its tags
	left        int                    // rows that have to wait
}

// job is a row with what SQL says of its name now. It is nil in do when a later change has taken the row's place, which
// then writes what there is to write.
type job struct {
	row  names.OutboxRow
	refs []digest.Digest // that must be durable before do
	gone digest.Digest   // the blob of a membership that ended, else empty
	do   func(ctx context.Context, b bucket.Bucket) error
	err  error

	stamped bool // the bucket has the change, although the row has to wait
}

func (b *batch) run(ctx context.Context) error {
	jobs := b.look(ctx)
	var g errgroup.Group
	g.SetLimit(rowsAtOnce)
	for _, j := range jobs {
		if j.err == nil && j.do != nil {
			g.Go(func() error { j.err = b.write(ctx, j, rowStall); return nil })
		}
	}
	_ = g.Wait() // each job has its own error
	return b.finish(ctx, jobs)
}

// look finds out what the rows that are due have to write.
func (b *batch) look(ctx context.Context) []*job {
	x := b.lane.x
	jobs := make([]*job, 0, len(b.rows))
	var refs, gone []digest.Digest
	for _, row := range b.rows {
		if !x.aside.due(row.ID) {
			b.left++
			continue
		}
		j := b.prepare(ctx, row)
		jobs, refs = append(jobs, j), append(refs, j.refs...)
		if j.gone != "" {
			gone = append(gone, j.gone)
		}
	}
	b.ask(ctx, refs, gone)
	return jobs
}

// ask asks origins which blobs the bucket has, and which of those that are gone they may still link.
func (b *batch) ask(ctx context.Context, refs, gone []digest.Digest) {
	x, anyRepo := b.lane.x, b.rows[0].Record.Repository // all of one bucket
	if len(refs) > 0 {
		slices.Sort(refs)
		b.durable, b.unreachable = x.durable(ctx, anyRepo, slices.Compact(refs))
	}
	if len(gone) > 0 {
		var err error
		b.owed, err = x.owed(ctx, anyRepo, gone)
		b.unreachable = errors.Join(b.unreachable, err)
	}
}

// write does a job, and gives it up when the bucket makes no progress with it for stall.
func (b *batch) write(ctx context.Context, j *job, stall time.Duration) error {
	for _, d := range j.refs {
		if !b.durable[d] {
			return fmt.Errorf("blob %s: %w", d, errNotDurable)
		}
	}
	repo := j.row.Record.Repository
	_, bucket, ok := b.lane.x.buckets.For(repo)
	if !ok {
		return fmt.Errorf("no bucket is configured for repository %s", repo)
	}
	ctx, moving, stop := whileMoving(ctx, bucket, stall)
	defer stop()
	return j.do(ctx, moving)
}

// finish forgets the rows that are done and sets those aside that failed for themselves. It returns an error when the
// bucket does not answer, so that no row is to blame.
func (b *batch) finish(ctx context.Context, jobs []*job) error {
	x := b.lane.x
	var done []names.OutboxRow
	var failed []*job
	var there []int64 // generations of changes that the bucket has
	for _, j := range jobs {
		if j.err == nil || j.stamped {
			there = append(there, j.row.Record.Generation)
		}
		switch {
		case j.err == nil:
			done = append(done, j.row)
		case errors.Is(j.err, errNotDurable):
			b.left++
		default:
			b.left++
			failed = append(failed, j)
		}
	}
	if bucket, ok := x.buckets.Get(b.lane.name); ok && len(there) > 0 {
		state, err := x.db.State(ctx) // later changes may have been committed before these
		if err != nil {
			return err
		}
		if err := b.lane.raiseMark(ctx, bucket, state.LastGeneration); err != nil { // before the rows go
			return errors.Join(err, b.lane.ask(ctx))
		}
		b.lane.answered(nil)
	}
	if err := x.published(ctx, done); err != nil {
		return err
	}
	for _, generation := range there {
		x.publications.tell(generation)
	}
	if len(failed) == 0 {
		return nil
	}
	if err := b.lane.ask(ctx); err != nil {
		return err
	}
	for _, j := range failed {
		if queued, err := x.isStillQueued(ctx, j.row); err != nil {
			return err
		} else if queued {
			x.setRowAside(j.row, j.err)
		}
	}
	return nil
}

// isStillQueued reports whether a row has not been written meanwhile, beside the one that failed.
func (x *Index) isStillQueued(ctx context.Context, row names.OutboxRow) (bool, error) {
	if row.Err != nil {
		return true, nil // it can't be read, nor found by its generation
	}
	rows, err := x.db.Queued(ctx, row.Record.Generation)
	return slices.ContainsFunc(rows, func(r names.OutboxRow) bool { return r.ID == row.ID }), err
}

func (x *Index) setRowAside(row names.OutboxRow, err error) {
	x.m.outboxErrors.Inc()
	if x.aside.failed(row, err) {
		r := row.Record
		x.log.Warn("a change can't be written to the bucket and is set aside; others go on", "row", row.ID, "kind", r.Kind,
			"repository", r.Repository, "tag", r.Tag, "digest", r.Digest, "error", err)
	}
}

// published forgets changes that the bucket has, in one transaction: after a crash before it they are written once
// more.
func (x *Index) published(ctx context.Context, rows []names.OutboxRow) error {
	if len(rows) == 0 {
		return nil
	}
	err := x.db.Update(ctx, func(tx names.Tx) error {
		for _, row := range rows {
			if err := tx.Done(row.ID); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	x.m.published.Add(float64(len(rows)))
	var recorded []cluster.NameRecord
	for _, row := range rows {
		x.aside.done(row.ID)
		if row.Record.Version != unrecorded {
			recorded = append(recorded, row.Record)
		}
	}
	if x.begunTenure() {
		x.forgetLater(recorded)
	} else {
		x.forgetAll(ctx, recorded)
	}
	return nil
}

// forgetAll makes origins forget the records of changes that the bucket has.
func (x *Index) forgetAll(ctx context.Context, rs []cluster.NameRecord) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, 16)
	for _, r := range rs {
		slots <- struct{}{}
		wg.Go(func() {
			x.forget(ctx, r)
			<-slots
		})
	}
	wg.Wait()
}

// prepare looks up in SQL what a row has to write.
func (b *batch) prepare(ctx context.Context, row names.OutboxRow) *job {
	j := &job{row: row, err: row.Err}
	if j.err != nil {
		return j
	}
	c := row.Record.Change()
	switch {
	case c.PutsManifest():
		b.prepareManifest(ctx, j)
	case c.Act == cluster.Put:
		// It is written at the generation that it has in SQL. The row is not done before that, also where it was pushed
		// again since: of a later push there may be no record, and that of this one goes with the row.
		l, err := b.lane.x.db.Layer(ctx, c.Repository, c.Digest)
		if j.err = ignoreMissing(err); err == nil {
			c := c.At(max(c.Generation, l.Generation))
			j.refs = []digest.Digest{c.Digest}
			j.do = func(ctx context.Context, bucket bucket.Bucket) error {
				return putStamp(ctx, bucket, layout.Stamp{Change: c, Size: l.Size})
			}
		}
	case c.Act == cluster.Delete:
		b.prepareDeletion(ctx, j, c)
	default:
		j.err = fmt.Errorf("outbox has a record of kind %q, which this program does not know", row.Record.Kind)
	}
	return j
}

// prepareManifest has the manifest written at the generation that it has in SQL, and the tag if it still is of this
// row: one that has moved on is written by its own.
func (b *batch) prepareManifest(ctx context.Context, j *job) {
	x, r := b.lane.x, j.row.Record
	m, err := x.db.Manifest(ctx, r.Repository, registry.Reference{Digest: r.Digest})
	if err != nil {
		j.err = ignoreMissing(err) // deleted before it was written
		return
	}
	p, err := parseManifest(m.MediaType, m.Bytes)
	if err != nil {
		j.err = err
		return
	}
	var manifests []digest.Digest
	if !x.cfg.lax(r.Repository) {
		if j.refs, manifests, j.err = x.referredTo(ctx, r.Repository, p); j.err != nil {
			return
		}
	}
	setsTag := r.Tag != ""
	if setsTag {
		now, err := x.db.Tag(ctx, r.Repository, r.Tag)
		if j.err = ignoreMissing(err); j.err != nil {
			return
		}
		setsTag = err == nil && now.Generation == r.Generation && now.Digest == r.Digest
	}
	j.do = func(ctx context.Context, bucket bucket.Bucket) error {
		err := b.revisions.do(cluster.PutName(cluster.ManifestName(r.Repository, r.Digest)).At(m.Generation), func() error { return putRevision(ctx, bucket, m, manifests) })
		if err != nil || !setsTag {
			return err
		}
		return putTag(ctx, bucket, r, m.MediaType)
	}
}

// prepareDeletion has a deletion written unless the name was put again since. It waits until SQL knows all names of the
// bucket, because the deletion may be an old one. The stamp of a membership's deletion is written at once, and counts;
// the row is done when no origin owes the blob any more, because one that does writes a link when it has paid, which
// other registries would believe.
func (b *batch) prepareDeletion(ctx context.Context, j *job, c cluster.Change) {
	x := b.lane.x
	if !x.complete(c.Repository) {
		j.err = errNotDurable
		return
	}
	now, err := x.generationOf(ctx, c.Name)
	if j.err = ignoreMissing(err); err == nil && now > c.Generation || j.err != nil {
		return
	}
	if c.Kind == cluster.Membership {
		j.gone = c.Digest
	}
	j.do = func(ctx context.Context, bucket bucket.Bucket) error {
		err := putStamp(ctx, bucket, layout.Stamp{Change: c})
		j.stamped = err == nil
		if err == nil && b.owed[j.gone] {
			err = fmt.Errorf("an origin may still link blob %s: %w", j.gone, errNotDurable)
		}
		return err
	}
}

// generationOf returns the generation of a name that is in SQL, names.ErrNotFound when it is not.
func (x *Index) generationOf(ctx context.Context, n cluster.Name) (int64, error) {
	switch n.Kind {
	case cluster.Tag:
		v, err := x.db.Tag(ctx, n.Repository, n.Tag)
		return v.Generation, err
	case cluster.Membership:
		l, err := x.db.Layer(ctx, n.Repository, n.Digest)
		return l.Generation, err
	}
	m, err := x.db.StatManifest(ctx, n.Repository, n.Digest)
	return m.Generation, err
}

// referredTo divides what a manifest refers to into blobs and manifests.
func (x *Index) referredTo(ctx context.Context, repo string, p *parsed) (blobs, manifests []digest.Digest, err error) {
	blobs, manifests = slices.Clone(p.blobs), slices.Clone(p.manifests)
	if x.mirror.foreign(repo) { // of an index that was written back some children may never come
		return blobs, nil, nil
	}
	for _, d := range p.either {
		ok, err := x.hasManifest(ctx, repo, d)
		if err != nil {
			return nil, nil, err
		}
		if ok {
			manifests = append(manifests, d)
		} else {
			blobs = append(blobs, d)
		}
	}
	return blobs, manifests, nil
}

// errSilentOrigin is an origin that was found not to answer, and is asked again when it does.
var errSilentOrigin = fmt.Errorf("%w: it does not answer", registry.ErrUnavailable)

// askDurable asks one origin about blobs, and is patient for a moment only: there are others.
func (x *Index) askDurable(ctx context.Context, o *cluster.Origin, repo string, ds []digest.Digest) (cluster.DurableResponse, error) {
	if !o.Answers() {
		return cluster.DurableResponse{}, fmt.Errorf("origin %s: %w", o.ID, errSilentOrigin)
	}
	out, err := o.Durable(transport.WithProgressTimeout(ctx, cluster.Stall), repo, ds)
	if err != nil {
		return out, fmt.Errorf("origin %s: %w", o.ID, err)
	}
	return out, nil
}

// durable returns which blobs the bucket of a repository has. Each owner is asked once for all blobs that no owner
// before it knew to be there, and another origin in the place of each owner that can't be asked, unless an owner owes
// the blob: the other has to look in the bucket. The error says that blobs are left of which too few could be asked;
// what others know is returned beside it.
func (x *Index) durable(ctx context.Context, repo string, ds []digest.Digest) (map[digest.Digest]bool, error) {
	known, owed, asked := map[digest.Digest]bool{}, map[digest.Digest]bool{}, map[digest.Digest]int{}
	order := make(map[digest.Digest][]*cluster.Origin, len(ds))
	for _, d := range ds {
		order[d] = x.origins.For(d)
	}
	dead := map[*cluster.Origin]error{}
	for rank := range x.origins.All() {
		byOrigin := map[*cluster.Origin][]digest.Digest{}
		for _, d := range ds {
			if known[d] || asked[d] >= x.copies() {
				continue
			}
			if o := order[d][rank]; dead[o] == nil && (!owed[d] || x.origins.Ring().Owns(o.ID, d)) {
				byOrigin[o] = append(byOrigin[o], d)
			}
		}
		for o, all := range byOrigin {
			for part := range slices.Chunk(all, cluster.MaxDurableDigests) {
				resp, err := x.askDurable(ctx, o, repo, part)
				if err != nil {
					dead[o] = err
					break
				}
				for _, d := range part {
					asked[d]++
				}
				for _, d := range resp.Durable {
					known[d] = true
				}
				for _, d := range resp.Pending {
					owed[d] = true
				}
			}
		}
	}
	for _, d := range ds {
		if !known[d] && !owed[d] && asked[d] < x.copies() {
			return known, errors.Join(slices.Collect(maps.Values(dead))...)
		}
	}
	return known, nil
}

// owed returns which blobs any origin still owes to the bucket of a repository. What an origin that does not answer may
// owe counts as owed.
func (x *Index) owed(ctx context.Context, repo string, ds []digest.Digest) (map[digest.Digest]bool, error) {
	slices.Sort(ds)
	ds = slices.Compact(ds)
	owed := map[digest.Digest]bool{}
	var failed error
	for _, o := range x.origins.All() {
		for asked := range slices.Chunk(ds, cluster.MaxDurableDigests) {
			resp, err := x.askDurable(ctx, o, repo, asked)
			if err != nil {
				failed = errors.Join(failed, err)
				resp.Pending = asked
			}
			for _, d := range resp.Pending {
				owed[d] = true
			}
		}
	}
	return owed, failed
}

// once runs one function for each change, and gives its error to all who ask for the same. A manifest that was put
// again while its rows were prepared has two.
type once struct {
	mu   sync.Mutex
	done map[cluster.Change]*result
}

// result is there when ready is closed.
type result struct {
	ready chan struct{}
	err   error
}

func (o *once) do(n cluster.Change, f func() error) error {
	o.mu.Lock()
	if o.done == nil {
		o.done = map[cluster.Change]*result{}
	}
	r, asked := o.done[n]
	if !asked {
		r = &result{ready: make(chan struct{})}
		o.done[n] = r
	}
	o.mu.Unlock()
	if !asked {
		r.err = f()
		close(r.ready)
	}
	<-r.ready
	return r.err
}
