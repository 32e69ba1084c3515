package agent

import (
	"context"
	"crypto/sha1"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// arriving is a blob that an origin still fetches, from an upstream registry or a bucket, while agents trade what has
// come. The hashes of its pieces follow the bytes. It implements swarm.Hashes and is safe for concurrent use.
type arriving struct {
	a      *Agent
	repo   string
	digest digest.Digest
	size   int64

	lost    chan struct{} // has a place: the origin does not answer, or has nothing any more
	changed store.Signal

	mu       sync.Mutex
	origin   *cluster.Origin // that fetches
	hashes   []byte
	received int64 // bytes that have come to the origin
	err      error // why it will not come
}

const (
	// pendingLimit is how long an upstream may take until it has said how large a blob is. Runtimes wait little longer
	// for a header.
	pendingLimit = 28 * time.Second
	// arrivingSlack is by how much an answer about pieces may be later than it says.
	arrivingSlack = 2 * time.Second
	// arrivingPause is how long to wait before an origin that failed is asked again.
	arrivingPause = 250 * time.Millisecond
	// arrivingTries is how often in a row origins may say that a blob does not arrive.
	arrivingTries = 2
)

// errPassed says that origins don't keep a blob, or no longer. Its readers get it from them without the cache.
var errPassed = errors.New("origins pass it on and don't keep it")

// errNowhere says that no origin, no bucket and no upstream has a blob.
var errNowhere = errors.New("it is nowhere")

// arrives asks the origins how far a blob is that has no metainfo, which makes them fetch it. It returns the blob that
// arrives, or its metainfo where it has become whole.
func (a *Agent) arrives(ctx context.Context, p *pull) (*arriving, *blob.Metainfo, error) {
	r := &arriving{a: a, repo: p.repo, digest: p.digest, lost: make(chan struct{}, 1)}
	deadline := time.Now().Add(pendingLimit)
	for {
		x, err := r.ask(ctx)
		switch {
		case registry.Says(err, registry.ErrBlobUnknown):
			return nil, nil, fmt.Errorf("%w: %w", errNowhere, err)
		case err != nil:
			return nil, nil, err
		case x.Pending && time.Now().Before(deadline):
			continue
		case x.Pending:
			return nil, nil, fmt.Errorf("%w: the upstream of %s has not answered", registry.ErrUnavailable, p.digest)
		case x.Passed:
			return nil, nil, errPassed
		case x.Whole:
			m, err := r.origin.Metainfo(ctx, p.repo, p.digest)
			return nil, m, err
		}
		r.size = x.Size
		return r, nil, r.take(x)
	}
}

// ask asks one origin after the other, who fetches first, and notes who that is.
func (r *arriving) ask(ctx context.Context) (cluster.Arriving, error) {
	var errs []error
	for _, o := range r.a.origins.For(r.digest) {
		x, err := o.Arriving(transport.WithProgressTimeout(ctx, r.patience()), r.repo, r.digest, cluster.ArrivingRequest{From: r.Known()})
		if err == nil {
			from := r.a.origins.Get(x.Origin)
			if from == nil {
				errs = append(errs, fmt.Errorf("origin %s names %q, which is no origin", o.ID, x.Origin))
				continue
			}
			r.mu.Lock()
			r.origin = from
			r.mu.Unlock()
			return x, nil
		}
		if ctx.Err() != nil {
			return x, context.Cause(ctx)
		}
		errs = append(errs, fmt.Errorf("origin %s: %w", o.ID, err))
		if registry.Says(err, registry.ErrBlobUnknown) {
			return x, err // it has looked at all the others
		}
		if registry.IsAnswer(err) {
			break // the others would ask the same one
		}
	}
	return cluster.Arriving{}, errors.Join(errs...)
}

// patience returns for how long an origin may be silent about the blob. One that waits for an upstream says so.
func (r *arriving) patience() time.Duration {
	stall := time.Duration(r.a.cfg.Peer.StallTimeout)
	if _, _, upstream := cluster.SplitUpstream(r.repo); upstream {
		return max(stall, time.Second+arrivingSlack)
	}
	return stall
}

// Known implements swarm.Hashes.
func (r *arriving) Known() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.hashes) / sha1.Size
}

// Received implements swarm.Hashes.
func (r *arriving) Received() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.received
}

// fetcher returns the origin that fetches the blob, as far as is known.
func (r *arriving) fetcher() *cluster.Origin {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.origin
}

// take notes hashes that an origin has told.
func (r *arriving) take(x cluster.Arriving) error {
	if x.Size != r.size {
		return fmt.Errorf("%w: %s has %d bytes at %s, and had %d", registry.ErrUnavailable, r.digest, x.Size, x.Origin, r.size)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.received = x.Received
	skip := len(r.hashes) - x.From*sha1.Size
	if skip < 0 || skip >= len(x.Hashes) {
		return nil
	}
	if pl := blob.PieceLength(r.size); int64(x.From+len(x.Hashes)/sha1.Size) > (r.size+pl-1)/pl {
		return fmt.Errorf("%w: %s tells of more pieces than %s has", registry.ErrUnavailable, x.Origin, r.digest)
	}
	r.hashes = append(r.hashes, x.Hashes[skip:]...)
	r.changed.Wake()
	return nil
}

// fail says that the blob will not come.
func (r *arriving) fail(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		r.err = err
		r.changed.Wake()
	}
}

// PieceHash implements swarm.Hashes.
func (r *arriving) PieceHash(ctx context.Context, i int) (h [sha1.Size]byte, err error) {
	for {
		changed := r.changed.C()
		r.mu.Lock()
		if len(r.hashes) >= (i+1)*sha1.Size {
			copy(h[:], r.hashes[i*sha1.Size:])
			r.mu.Unlock()
			return h, nil
		}
		err := r.err
		r.mu.Unlock()
		if err != nil {
			return h, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return h, context.Cause(ctx)
		}
	}
}

// metainfo returns the real metainfo, once all hashes are known.
func (r *arriving) metainfo() (*blob.Metainfo, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return blob.NewMetainfo(r.digest, r.size, r.hashes)
}

// complete reports whether the hashes of all pieces are known.
func (r *arriving) complete() bool {
	_, err := r.metainfo()
	return err == nil
}

// follow learns the hashes of the pieces as they come, and who fetches the blob when that is another origin now. It
// returns why the blob will not come, or nil when ctx is done.
func (r *arriving) follow(ctx context.Context) error {
	fails := 0
	for ctx.Err() == nil {
		if r.complete() {
			select {
			case <-r.lost:
			case <-ctx.Done():
				return nil
			}
			if _, err := r.ask(ctx); err == nil {
				continue
			}
		}
		err := r.more(ctx)
		switch {
		case err == nil:
			fails = 0
			continue
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, errPassed):
			r.fail(err)
			return err
		case registry.IsAnswer(err):
			if fails++; fails >= arrivingTries {
				r.fail(err)
				return err
			}
		default:
			silent := r.fetcher()
			r.a.log.Info("the origin that fetches a blob does not answer, another one is asked", "origin", silent.ID, "digest", r.digest, "error", err)
			if x, aerr := r.ask(ctx); aerr == nil && !x.Pending && r.fetcher() != silent {
				continue
			}
		}
		select {
		case <-time.After(arrivingPause):
		case <-ctx.Done():
		}
	}
	return nil
}

// more waits for further hashes at the origin that fetches.
func (r *arriving) more(ctx context.Context) error {
	o := r.fetcher()
	q := cluster.ArrivingRequest{From: r.Known(), Wait: true}
	x, err := o.Arriving(transport.WithProgressTimeout(ctx, time.Second+arrivingSlack), r.repo, r.digest, q)
	switch {
	case err != nil || x.Pending:
		return err
	case x.Passed:
		return errPassed
	}
	if from := r.a.origins.Get(x.Origin); from != nil && from != o {
		r.mu.Lock()
		r.origin = from
		r.mu.Unlock()
	}
	if !x.Whole {
		return r.take(x)
	}
	m, err := r.fetcher().Metainfo(ctx, r.repo, r.digest)
	if err != nil {
		return err
	}
	x = cluster.Arriving{Origin: x.Origin, Size: m.Size}
	for i := range m.NumPieces() {
		h := m.PieceHash(i)
		x.Hashes = append(x.Hashes, h[:]...)
	}
	return r.take(x)
}

// arrivingSource leases the pieces of a blob that arrives from whichever origin fetches it.
type arrivingSource struct {
	r     *arriving
	name  string
	lease func(*cluster.Origin) *leaseSource
}

// Name implements swarm.Source.
func (s *arrivingSource) Name() string { return s.name }

// Lease implements swarm.Source. It never says that the blob is not leased: in order, and without a lease, all agents
// would read the same.
func (s *arrivingSource) Lease(ctx context.Context, m *blob.Metainfo, q swarm.LeaseRequest) ([]int, time.Duration, error) {
	pieces, after, err := s.lease(s.r.fetcher()).Lease(ctx, m, q)
	if err == nil || errors.Is(err, swarm.ErrHeldBack) {
		return pieces, after, err
	}
	if ctx.Err() == nil {
		select {
		case s.r.lost <- struct{}{}:
		default:
		}
	}
	return nil, 0, errors.New(err.Error()) // in words only
}

// ReadRange implements swarm.Source.
func (s *arrivingSource) ReadRange(ctx context.Context, m *blob.Metainfo, off, n int64) (io.ReadCloser, error) {
	return s.lease(s.r.fetcher()).ReadRange(ctx, m, off, n)
}

// beginningSize is how many bytes of the begin of a blob that arrives are passed on as they come, before their piece
// was checked: at most one piece. Readers see their first byte when the upstream has sent it.
const beginningSize = blob.MinPieceLength

// beginning is the begin of a blob that arrives.
type beginning struct {
	changed store.Signal

	mu     sync.Mutex
	buf    []byte
	over   bool // nothing more comes
	agreed bool // it is as the checked piece says
	err    error
}

// read fills f from the origin that fetches the blob. What goes wrong is left to the swarm.
func (f *beginning) read(ctx context.Context, r *arriving) {
	defer f.end()
	n := min(r.size, beginningSize)
	ctx = transport.WithProgressTimeout(ctx, time.Duration(r.a.cfg.Peer.StallTimeout))
	c, err := r.fetcher().OpenBlob(ctx, r.repo, r.digest, registry.Range{Offset: 0, Length: n})
	if err != nil {
		r.a.log.Debug("the begin of a blob is not passed on", "digest", r.digest, "error", err)
		return
	}
	defer c.Close()
	from := &counted{r.a.swarm.LimitDownload(ctx, r.digest, io.LimitReader(c.Body, n)), r.a.m.fromHTTP}
	b := make([]byte, 16<<10)
	for {
		k, err := from.Read(b)
		f.add(b[:k])
		if err != nil {
			return
		}
	}
}

func (f *beginning) add(b []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.buf = append(f.buf, b...)
	f.changed.Wake()
}

func (f *beginning) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.over = true
	f.changed.Wake()
}

// agree returns an error when the first piece, which was checked, is not what was passed on.
func (f *beginning) agree(read func(b []byte, off int64) (int, error)) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.agreed || f.err != nil {
		return f.err
	}
	b := make([]byte, len(f.buf))
	if _, err := read(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	f.over, f.agreed = true, true
	if string(b) != string(f.buf) {
		f.err = fmt.Errorf("%w: the begin of the blob was passed on wrong", store.ErrDigestMismatch)
	}
	return f.err
}

// beginningBody is a swarmBody whose begin can be read before its piece was checked.
type beginningBody struct {
	*swarmBody
	beginning *beginning
}

// wait implements body.
func (b *beginningBody) wait(ctx context.Context, off int64) (int64, error) {
	for !b.part.Has(0) && off < beginningSize {
		changed := b.beginning.changed.C()
		b.beginning.mu.Lock()
		n, over := int64(len(b.beginning.buf)), b.beginning.over
		b.beginning.mu.Unlock()
		if off < n {
			return n, nil
		}
		if over {
			break
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, context.Cause(ctx)
		}
	}
	end, err := b.swarmBody.wait(ctx, off)
	if err == nil && b.part.Has(0) {
		err = b.beginning.agree(b.part.ReadAt)
	}
	return end, err
}

// ReadAt implements body.
func (b *beginningBody) ReadAt(p []byte, off int64) (int, error) {
	b.beginning.mu.Lock()
	if off < int64(len(b.beginning.buf)) && !b.beginning.agreed {
		n := copy(p, b.beginning.buf[off:])
		b.beginning.mu.Unlock()
		if n == len(p) {
			return n, nil
		}
		k, err := b.swarmBody.ReadAt(p[n:], off+int64(n))
		return n + k, err
	}
	b.beginning.mu.Unlock()
	return b.swarmBody.ReadAt(p, off)
}
