package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

var (
	errAbandoned    = errors.New("nobody reads this blob any more")
	errShuttingDown = errors.New("the agent is shutting down")
)

// closedChan is closed from the start.
var closedChan = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// pull is one download of one blob, shared by all its readers. It belongs to the agent, not to the request that began
// it.
type pull struct {
	digest digest.Digest
	repo   string
	began  time.Time
	ctx    context.Context
	cancel context.CancelCauseFunc

	wrong    []string // the second try: origins of which one has sent other bytes in the first
	suspects []string // of this one, when it has failed for that reason

	ready chan struct{} // closed when size and body are set, or the pull has failed
	size  int64
	body  body

	done   chan struct{} // closed when the blob is in the cache, or the pull has failed
	err    error         // read after done
	second *pull         // begun in its place because this one got wrong bytes, nil: none was; read after done

	mu      sync.Mutex
	readers int // and one for the download itself
	// closed says that the pull can't be joined any more: it was cancelled because nobody read it, or what it has is
	// wrong.
	closed bool
	fetch  *swarm.Fetch // set while pieces are swarmed
	left   func() int64 // bytes that are still missing
}

// body is where readers of a blob in flight read.
type body interface {
	io.ReaderAt
	// wait blocks until the byte at off has been verified, or received where nothing can be verified yet, and returns
	// the end of what can be read from off on.
	wait(ctx context.Context, off int64) (end int64, err error)
	// want says that a reader will read from off on; the body fetches that first.
	want(reader int64, off int64)
	// unwant ends the wish of a reader that has gone.
	unwant(reader int64)
	// close is called once, when the pull is over and its last reader has gone.
	close()
}

// join returns the pull of d, begun now if there is none, with one reader more. leave must be called once. Where none
// can be joined, wait is closed when to look again: at the end of one that is being given up, or at once when the cache
// lacked d as the caller looked, and one that ended since has brought it.
func (a *Agent) join(repo string, d digest.Digest, lacked bool) (p *pull, wait <-chan struct{}, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.pulls[d]; p != nil {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.closed {
			return nil, p.done, nil
		}
		p.readers++
		return p, nil, nil
	}
	if a.closing {
		return nil, nil, fmt.Errorf("%w: %w", registry.ErrUnavailable, errShuttingDown)
	}
	if _, err := a.store.Stat(d); err == nil && lacked {
		return nil, closedChan, nil
	}
	p = a.begin(repo, d, nil)
	p.readers++
	a.wg.Go(func() {
		for p := p; p != nil; {
			p = a.download(p)
		}
	})
	return p, nil, nil
}

// begin makes a pull that can be joined, of no reader yet. a.mu is held.
func (a *Agent) begin(repo string, d digest.Digest, wrong []string) *pull {
	ctx, cancel := context.WithCancelCause(a.ctx)
	p := &pull{
		digest: d, repo: repo, began: time.Now(), ctx: ctx, cancel: cancel, wrong: wrong, readers: 1,
		ready: make(chan struct{}), done: make(chan struct{}), left: func() int64 { return -1 },
	}
	a.pulls[d] = p
	return p
}

// download runs a pull to its end. When origins sent other bytes than the digest's, and somebody else may have the
// right ones, a second pull is in its place then, and is the caller's to run: who has read wrong bytes can't be helped,
// but who still waits, and the next reader, find the right ones on their way.
func (a *Agent) download(p *pull) (second *pull) {
	d := p.digest
	err := a.run(p.ctx, p)
	if errors.Is(err, store.ErrFull) {
		err = fmt.Errorf("%w: %w", registry.ErrStorageFull, err)
	}
	p.cancel(nil)
	a.mu.Lock()
	delete(a.pulls, d)
	if err != nil && p.wrong == nil && len(p.suspects) > 0 && !a.closing && len(a.originsBut(d, p.suspects)) > 0 {
		second = a.begin(p.repo, d, p.suspects)
		p.second = second
	}
	a.mu.Unlock()
	switch {
	case err == nil, errors.Is(err, errAbandoned):
	case errors.Is(err, registry.ErrBlobUnknown): // whoever asks for what there is not makes no failure of it
		a.log.Info("no origin knows a blob that was asked for", "repository", p.repo, "digest", d)
	case a.ctx.Err() != nil:
		a.log.Info("the agent ends before a pull does", "repository", p.repo, "digest", d)
	default:
		a.m.failed.Inc()
		a.log.Warn("pull failed", "repository", p.repo, "digest", d, "error", err)
	}
	p.finish(err)
	p.release()
	if err != nil && second == nil {
		a.announcer.gone(d)
	}
	return second
}

// release takes one user off; the last one closes the body.
func (p *pull) release() {
	p.mu.Lock()
	p.readers--
	last := p.readers == 0
	p.mu.Unlock()
	if last && p.body != nil {
		p.body.close()
	}
}

// leave takes one reader off. A pull that nobody reads is cancelled, unless most of it is there: then it is finished
// for the next one and for the swarm. What was fetched stays on disk either way, and the next pull resumes.
func (a *Agent) leave(p *pull) {
	p.mu.Lock()
	if p.readers == 2 { // this one and the download itself
		if left := p.left(); left < 0 || left > p.size/2 {
			p.closed = true
			p.cancel(errAbandoned)
		}
	}
	p.mu.Unlock()
	p.release()
}

// publish makes the body readable.
func (p *pull) publish(size int64, b body, left func() int64) {
	p.mu.Lock()
	p.size, p.body, p.left = size, b, left
	p.mu.Unlock()
	close(p.ready)
}

func (p *pull) finish(err error) {
	p.err = err
	select {
	case <-p.ready:
	default:
		close(p.ready)
	}
	close(p.done)
}

// run downloads one blob by the best way that works: swarm, else HTTP from an origin.
func (a *Agent) run(ctx context.Context, p *pull) error {
	began := time.Now()
	if p.wrong != nil {
		return a.overHTTP(ctx, p)
	}
	if size, ok := a.sizes.Get(p.digest); ok && size <= a.smallBlob {
		return a.overHTTP(ctx, p)
	}
	m, peers, err := a.locate(ctx, p)
	switch {
	case err != nil:
		a.log.Info("no metainfo, fetching over HTTP", "repository", p.repo, "digest", p.digest, "reason", err)
		return a.overHTTP(ctx, p)
	case m.Size <= a.smallBlob:
		return a.overHTTP(ctx, p)
	}
	err = a.overSwarm(ctx, p, m, peers)
	if err == nil {
		a.m.duration.Observe(time.Since(began).Seconds())
	}
	return err
}

// locate asks the tracker for metainfo and peers in one round trip. When the tracker can't say, an owner is asked for
// the metainfo, and the pieces come from origins and from peers that come by.
func (a *Agent) locate(ctx context.Context, p *pull) (*blob.Metainfo, []swarm.Peer, error) {
	known, err := a.store.Metainfo(p.digest)
	if err != nil {
		known = nil // not resumed: nobody has told us the metainfo yet
	}
	tctx, cancel := context.WithTimeout(ctx, trackerBudget)
	defer cancel()
	answer, err := a.announcer.ask(tctx, announce.BlobState{
		Digest: p.digest, Repository: p.repo, Event: announce.EventStarted, Left: -1, Want: true, NeedMetainfo: known == nil,
	})
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return nil, nil, context.Cause(ctx) // nobody reads it any more: the tracker's silence is not to blame
	default:
		a.m.trackerErrors.Inc()
		a.log.Warn("tracker does not answer, going on without peers", "digest", p.digest, "error", err)
	}
	peers := toPeers(answer.Peers)
	if known != nil {
		return known, peers, nil
	}
	if len(answer.Metainfo) > 0 {
		m, err := blob.ParseMetainfo(answer.Metainfo)
		if err == nil && m.Digest == p.digest {
			return m, peers, nil
		}
		a.log.Warn("tracker sent a wrong metainfo", "digest", p.digest, "error", err)
	}
	m, err := a.metainfoFromOrigins(ctx, p)
	return m, peers, err
}

func (a *Agent) metainfoFromOrigins(ctx context.Context, p *pull) (*blob.Metainfo, error) {
	var errs []error
	unknown := 0
	owners := a.origins.Owners(p.digest)
	for _, o := range owners {
		// An origin that is silent is then known to be, and asked last for the bytes.
		mctx, cancel := context.WithTimeout(transport.WithProgressTimeout(ctx, time.Duration(a.cfg.Peer.StallTimeout)), metainfoBudget)
		m, err := o.Metainfo(mctx, p.repo, p.digest)
		cancel()
		if err == nil && m.Digest == p.digest {
			return m, nil
		}
		if errors.Is(err, registry.ErrBlobUnknown) {
			unknown++
			err = errors.New(err.Error()) // in words only: what one does not know another may have
		}
		errs = append(errs, fmt.Errorf("metainfo of %s from %s: %w", p.digest, o.ID, err))
	}
	if unknown == len(owners) && unknown > 0 {
		return nil, fmt.Errorf("%w: no owner knows %s", registry.ErrUnavailable, p.digest)
	}
	return nil, errors.Join(errs...)
}

// overSwarm trades pieces with other agents and leases from the owners the pieces that nobody has yet.
func (a *Agent) overSwarm(ctx context.Context, p *pull, m *blob.Metainfo, peers []swarm.Peer) error {
	part, err := a.store.Partial(m)
	if err != nil {
		return fmt.Errorf("open partial blob %s: %w", p.digest, err)
	}
	var sources []swarm.Source
	for _, o := range a.origins.Owners(p.digest) {
		sources = append(sources, &leaseSource{origin: o, repo: p.repo, peer: a.swarm.PeerID(), bytes: a.m.fromOrigins, swarm: a.swarm, tell: a.tell})
	}
	f, err := a.swarm.Fetch(ctx, swarm.Request{Partial: part, Sources: sources, Peers: peers})
	if err != nil {
		return errors.Join(fmt.Errorf("swarm %s: %w", p.digest, err), part.Close())
	}
	defer func() {
		if err := f.Close(); err != nil {
			a.log.Warn("fetch did not end well", "digest", p.digest, "error", err)
		}
	}()
	b := &swarmBody{part: part, fetch: f, m: m}
	p.mu.Lock()
	p.fetch = f
	p.mu.Unlock()
	p.publish(m.Size, b, func() int64 { return missing(m, part) })
	select {
	case <-f.Done():
		err = f.Err()
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	p.mu.Lock()
	p.fetch = nil
	p.mu.Unlock()
	if err != nil {
		part.Fail(err)
		return fmt.Errorf("swarm %s: %w", p.digest, err)
	}
	if _, err := part.Commit(ctx); err != nil {
		part.Fail(err)
		if errors.Is(err, store.ErrDigestMismatch) {
			a.badMetainfo(ctx, p)
		}
		return fmt.Errorf("commit %s: %w", p.digest, err)
	}
	a.announcer.completed(p.repo, m, received(f))
	s := f.Stats()
	a.log.Info("pulled", "repository", p.repo, "digest", p.digest, "size", m.Size, "from_peers", s.BytesFromPeers, "from_origins", s.BytesFromOrigins,
		"resumed", m.Size-s.BytesFromPeers-s.BytesFromOrigins, "took", time.Since(p.began).Round(time.Millisecond))
	return nil
}

// badMetainfo: every piece passed and the whole did not, so the metainfo is wrong. The origins recompute it; the next
// pull of this blob goes over HTTP.
func (a *Agent) badMetainfo(ctx context.Context, p *pull) {
	a.m.badMetainfo.Inc()
	for _, o := range a.origins.Owners(p.digest) {
		if err := o.DropMetainfo(ctx, p.repo, p.digest); err != nil {
			a.log.Warn("origin was not told of a wrong metainfo", "origin", o.ID, "digest", p.digest, "error", err)
		}
	}
	a.sizes.Add(p.digest, 0)
}

func missing(m *blob.Metainfo, part *store.Partial) int64 {
	bm := part.Bitmap()
	left := m.Size
	for i := range m.NumPieces() {
		if bm.Has(i) {
			left -= m.PieceSize(i)
		}
	}
	return left
}

// heldWhole is up to what size, in bytes, nobody gets anything of a blob before all of it was verified. So much is soon
// there, and a reader of the whole would have to wait for the last byte in any case.
const heldWhole = 64 << 10

// overHTTP streams the blob from its origins into the cache, mostly from one. Readers follow the bytes as they arrive,
// or get them from memory once all are there.
func (a *Agent) overHTTP(ctx context.Context, p *pull) error {
	r := a.newHTTPSource(ctx, p.repo, p.digest, p.wrong)
	defer r.Close()
	if err := r.open(); err != nil {
		return err
	}
	u, err := a.store.NewUpload(store.UploadOptions{
		Size: r.size, Digest: p.digest, Note: p.repo, Transient: true, NoMetainfo: r.size <= a.smallBlob,
	})
	if err != nil {
		return fmt.Errorf("make room for %s: %w", p.digest, err)
	}
	from := a.swarm.LimitDownload(ctx, p.digest, r)
	end := func(error) {}
	var held *bytes.Reader
	if r.size <= heldWhole {
		held, err = a.hold(ctx, p, u, from, r.size)
	} else {
		end, err = a.follow(ctx, p, u, from, r.size)
	}
	if err == nil {
		_, err = u.Commit(ctx, p.digest, nil)
	}
	if errors.Is(err, store.ErrDigestMismatch) {
		err = fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
	}
	if err == nil {
		if r.size > a.smallBlob {
			if m, err := a.store.Metainfo(p.digest); err == nil {
				a.swarm.Register(m)
				a.announcer.completed(p.repo, m, m.Size)
			}
		}
		if held != nil {
			p.publish(r.size, heldBody{held}, func() int64 { return 0 })
		}
		end(nil)
		return nil
	}
	if p.suspects = r.suspects(err); p.suspects != nil {
		a.tell(p.repo, p.digest, p.suspects...)
		p.mu.Lock()
		p.closed = true // who comes back at once is to find the second try
		p.mu.Unlock()
	}
	end(err)
	if aerr := u.Abort(); aerr != nil && !errors.Is(aerr, store.ErrUploadUnknown) {
		a.log.Warn("session of a failed fetch stays until it expires", "digest", p.digest, "error", aerr)
	}
	return fmt.Errorf("fetch %s over HTTP: %w", p.digest, err)
}

// follow writes from to u, with readers behind it until end is called.
func (a *Agent) follow(ctx context.Context, p *pull, u *store.Upload, from io.Reader, size int64) (end func(error), err error) {
	g, err := u.Growth()
	if err != nil {
		return func(error) {}, err
	}
	p.publish(size, followed{g}, func() int64 { return size - g.Written() })
	_, err = u.Write(ctx, 0, &counted{from, a.m.fromHTTP})
	return g.End, err
}

// hold writes from to u, and returns what it wrote.
func (a *Agent) hold(ctx context.Context, p *pull, u *store.Upload, from io.Reader, size int64) (*bytes.Reader, error) {
	p.mu.Lock()
	p.size, p.left = size, func() int64 { return size - u.Offset() }
	p.mu.Unlock()
	held := bytes.NewBuffer(make([]byte, 0, size))
	n, err := u.Write(ctx, 0, io.TeeReader(from, held))
	a.m.fromHTTP.Add(float64(n))
	return bytes.NewReader(held.Bytes()), err
}
