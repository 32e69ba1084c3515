package agent

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// errOtherSize says that an origin named another size than the one before it: one of the two does not have the blob.
var errOtherSize = errors.New("origins disagree about the size")

// httpSource reads one blob over HTTP from the origins that may have it. Where one refuses, breaks off, or sends
// nothing for the stall timeout, the next goes on at the byte that is missing. It verifies nothing, but it never ends
// clean before all bytes were read. One goroutine uses it.
//
// Each is asked in turn, owners first. After a second turn that brought nothing the source fails, unless somebody was
// merely silent, as an origin is that waits for the bucket: then further turns follow, each with twice the patience of
// the one before, until nothing has come for the client's progress timeout. A blob of the cluster's own whose size is
// known is asked for until nothing has come for origin_patience: who reads it may have got its headers, and can't begin
// anew. Who says that it does not know the blob is not asked again.
type httpSource struct {
	a      *Agent
	ctx    context.Context
	repo   string
	digest digest.Digest

	origins []originState
	owners  int  // the first so many, the others are helpers
	all     bool // the helpers are in origins

	next    int       // who is asked next
	turn    int       // how often all have been asked since something came
	silent  bool      // somebody was, in this turn
	came    bool      // something did, in this turn
	since   time.Time // something came, or the beginning
	counted int64     // pos, when something came

	body    *registry.Content // nil: the next one has to be asked
	current int               // the index in origins of who is asked, or whose body it is
	size    int64             // bytes; sizeUnknown before the first answer
	sizer   int               // the index in origins of who said so
	pos     int64             // of the next byte to read
}

// sizeUnknown is the size of a blob of which no origin has said one.
const sizeUnknown = -1

// originState is one origin as an httpSource knows it.
type originState struct {
	*cluster.Origin
	err     error // of its last try
	unknown bool  // it does not know the blob
	stalled bool  // its last try ended because it was silent
	last    int64 // offset after the last byte that was read from it; 0: none was
}

// worthwhile is how many bytes must have come for the turns to be counted anew: as much as the swarm wants of a source
// in a stall timeout. It bounds the tries by the blob's size.
const worthwhile = 32 << 10

// newHTTPSource returns a source of d that has asked nobody yet. The origins in wrong have sent other bytes before: a
// single one is not asked; of several, of which some are innocent, the last is asked first, and all of them after
// everybody else. Close must be called.
func (a *Agent) newHTTPSource(ctx context.Context, repo string, d digest.Digest, wrong []string) *httpSource {
	r := &httpSource{a: a, ctx: ctx, repo: repo, digest: d, size: sizeUnknown, since: time.Now()}
	if len(wrong) == 0 {
		r.add(a.origins.Owners(d))
	} else {
		r.add(a.originsBut(d, wrong))
		r.all = true
	}
	r.owners = len(r.origins)
	return r
}

// originsBut returns whom to ask for d, in order, when some have sent other bytes: everybody else, and where several
// are suspected, these at the end. It is empty when the only one that is left is the single suspect.
func (a *Agent) originsBut(d digest.Digest, wrong []string) []*cluster.Origin {
	out := a.others(d, wrong)
	if len(wrong) > 1 {
		for _, id := range slices.Backward(wrong) {
			out = append(out, a.origins.Get(id))
		}
	}
	return out
}

// others returns all origins but the ones named, in the order in which to ask for d.
func (a *Agent) others(d digest.Digest, but []string) []*cluster.Origin {
	return slices.DeleteFunc(a.origins.For(d), func(o *cluster.Origin) bool { return slices.Contains(but, o.ID) })
}

func (r *httpSource) add(origins []*cluster.Origin) {
	r.origins = slices.Grow(r.origins, len(origins))
	for _, o := range origins {
		r.origins = append(r.origins, originState{Origin: o})
	}
}

// open asks one origin after the other for what is missing until one answers, and sets body and size.
func (r *httpSource) open() error {
	for r.body == nil {
		if err := r.choose(); err != nil {
			return err
		}
		o := r.origins[r.current]
		c, err := o.OpenBlob(transport.WithProgressTimeout(r.ctx, r.patience()), r.repo, r.digest, registry.Range{Offset: r.pos, Length: -1})
		if err == nil {
			err = r.take(c)
		}
		if err != nil {
			if err := r.tryFailed(err); err != nil {
				return err
			}
		}
	}
	return nil
}

// take makes c the body that is read, from pos on. It is closed where its size is not the one that was said before.
func (r *httpSource) take(c *registry.Content) error {
	if r.size < 0 {
		r.size, r.sizer = c.Size, r.current
	}
	if c.Size != r.size {
		return errors.Join(fmt.Errorf("%w: %d bytes, and %s said %d", errOtherSize, c.Size, r.origins[r.sizer].ID, r.size), c.Close())
	}
	if _, err := c.Body.Seek(r.pos, io.SeekStart); err != nil {
		return errors.Join(err, c.Close())
	}
	r.body = c
	return nil
}

// Read implements io.Reader. An error is final.
func (r *httpSource) Read(b []byte) (int, error) {
	for r.size < 0 || r.pos < r.size {
		if err := r.open(); err != nil {
			return 0, err
		}
		n, err := r.body.Body.Read(b)
		if n > 0 {
			r.pos += int64(n)
			r.origins[r.current].last = r.pos
		}
		if err != nil {
			r.Close()
			if err := r.tryFailed(err); err != nil {
				return n, err
			}
		}
		if n > 0 {
			return n, nil
		}
	}
	return 0, io.EOF
}

// Close ends the request under way.
func (r *httpSource) Close() error {
	if r.body == nil {
		return nil
	}
	c := r.body
	r.body = nil
	return c.Close()
}

// tryFailed notes why the current origin's try ended. It returns an error where asking others is of no use.
func (r *httpSource) tryFailed(err error) error {
	o := &r.origins[r.current]
	if r.ctx.Err() != nil {
		return errors.Join(context.Cause(r.ctx), r.reasons())
	}
	if errors.Is(err, registry.ErrDigestInvalid) || errors.Is(err, registry.ErrNameInvalid) {
		return err // as everybody would say
	}
	o.err = fmt.Errorf("origin %s: %w", o.ID, err)
	o.stalled = errors.Is(err, transport.ErrNoProgress)
	if o.unknown = errors.Is(err, registry.ErrBlobUnknown); o.unknown {
		// In words only: what one does not know is unknown when all say so.
		o.err = fmt.Errorf("origin %s: %v", o.ID, err)
	} else {
		r.a.m.originFailures.Inc()
		r.a.log.Info("origin does not deliver, the next one goes on", "origin", o.ID, "digest", r.digest, "offset", r.pos, "error", err)
	}
	if o.stalled {
		r.silent = true
		if r.current >= r.owners {
			// Every helper would read it from the bucket, too.
			r.next = len(r.origins)
		}
	}
	if r.pos-r.counted >= worthwhile {
		r.counted, r.since, r.turn, r.came = r.pos, time.Now(), 0, true
	}
	return nil
}

// choose sets current to the origin that is asked next, or returns why the source fails.
func (r *httpSource) choose() error {
	for {
		for ; r.next < len(r.origins); r.next++ {
			if !r.origins[r.next].unknown {
				r.current = r.next
				r.next++
				return nil
			}
		}
		if r.count(func(o *originState) bool { return o.unknown }) == r.owners {
			return fmt.Errorf("%w: %s", registry.ErrBlobUnknown, r.digest)
		}
		if r.widen() {
			continue
		}
		if err := r.again(); err != nil {
			return err
		}
	}
}

// count returns for how many owners so is true.
func (r *httpSource) count(so func(*originState) bool) (n int) {
	for i := range r.owners {
		if so(&r.origins[i]) {
			n++
		}
	}
	return n
}

// widen adds the origins that don't own the blob, and reports whether there are such: any can get it from the bucket,
// or from who owns it and is not reached from here. When all owners are silent that is more likely the bucket's fault
// than theirs, so they are given a second turn first.
func (r *httpSource) widen() bool {
	if r.all || (r.turn == 0 && r.count(func(o *originState) bool { return !o.stalled }) == 0) {
		return false
	}
	r.all = true
	known := make([]string, 0, len(r.origins))
	for i := range r.origins {
		known = append(known, r.origins[i].ID)
	}
	r.add(r.a.others(r.digest, known))
	return r.next < len(r.origins)
}

// again begins another turn, after a moment where nobody was silent, or returns why there is none.
func (r *httpSource) again() error {
	unknown := r.count(func(o *originState) bool { return o.unknown }) > 0
	idle := time.Since(r.since)
	hopeless := !r.silent || unknown || idle >= r.limit()
	begun := r.size >= 0 && !errors.Is(r.reasons(), errOtherSize)
	if r.turn > 0 && hopeless && !(begun && idle < r.a.originPatience(r.repo)) {
		return &registry.RetryError{Err: fmt.Errorf("%w: blob %s: %w", registry.ErrUnavailable, r.digest, r.reasons()), After: time.Second}
	}
	if !r.silent && !r.came {
		// A process that is being restarted, or a full queue, needs a moment.
		t := time.NewTimer(r.stall() / 4)
		defer t.Stop()
		select {
		case <-t.C:
		case <-r.ctx.Done():
			return errors.Join(context.Cause(r.ctx), r.reasons())
		}
	}
	r.next, r.silent, r.came = 0, false, false
	r.turn++
	return nil
}

func (r *httpSource) stall() time.Duration { return time.Duration(r.a.cfg.Peer.StallTimeout) }
func (r *httpSource) limit() time.Duration { return time.Duration(r.a.cfg.Client.ProgressTimeout) }

// patience returns for how long the current origin may be silent.
func (r *httpSource) patience() time.Duration {
	if r.turn == 0 {
		return r.stall()
	}
	left := r.limit() - time.Since(r.since)
	return max(r.stall(), min(r.stall()<<min(r.turn, 16), left))
}

// reasons joins the errors of the last try of each origin.
func (r *httpSource) reasons() error {
	var errs []error
	for i := range r.origins {
		errs = append(errs, r.origins[i].err)
	}
	return errors.Join(errs...)
}

// suspects returns the ids of the origins of which one at least is to blame for err: who sent the bytes that turned out
// to be others, in this order, and who said a size that somebody else denies. It is nil when err is of another kind.
func (r *httpSource) suspects(err error) []string {
	size := errors.Is(err, errOtherSize)
	if !size && !errors.Is(err, store.ErrDigestMismatch) {
		return nil
	}
	read := slices.Clone(r.origins)
	sizer := r.origins[r.sizer].ID
	read = slices.DeleteFunc(read, func(o originState) bool { return o.last == 0 && !((size || r.size == 0) && o.ID == sizer) })
	slices.SortStableFunc(read, func(a, b originState) int { return cmp.Compare(a.last, b.last) })
	var ids []string
	for _, o := range read {
		ids = append(ids, o.ID)
	}
	return ids
}
