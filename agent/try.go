package agent

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/announce"
	"kraken/proto/blob"
	"kraken/proto/cluster"
	"kraken/proto/registry"
	"kraken/proto/transport"
)

// try is one attempt of a pull to bring its blob. It tells the pull's owner what came of it, and changes no state.
type try struct {
	p        *pull
	suspects []string       // of the first try, in the second: origins of which one sent other bytes; nil in the first
	readable chan *incoming // what readers get, at most once
	begun    bool           // readable has got it; of the goroutine that runs the try
}

// result is what came of a try.
type result struct {
	err      error
	suspects []string    // origins of which one has sent other bytes, where that is why it failed
	finish   func(error) // may be nil; to be called once the pull's state says how the try ended
}

// publish hands the body to the owner.
func (t *try) publish(size int64, b body) {
	t.begun = true
	t.readable <- &incoming{p: t.p, size: size, body: b, ended: make(chan struct{})}
}

// tell notes how far the try is.
func (t *try) tell(r report) {
	t.p.mu.Lock()
	defer t.p.mu.Unlock()
	t.p.report = r
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
	// close is called once, when the try is over and its last reader has gone.
	close()
}

// run brings one blob. One of the cluster's own repositories is looked for anew, swarm included, until its bytes come,
// while origins restart or the bucket is away that alone has it.
func (a *Agent) run(ctx context.Context, t *try) result {
	var r result
	passing := func(err error) bool { return !t.begun && r.finish == nil && r.suspects == nil && isAway(err) }
	_, r.err = transport.AskAgain(ctx, a.originPatience(t.p.repo), passing, func() (struct{}, error) {
		r = a.bring(ctx, t)
		return struct{}{}, r.err
	})
	return r
}

// originPatience is how long the origins are asked for a blob of a repository while none can give it. Upstreams'
// readers have somewhere else to go: theirs are asked for once.
func (a *Agent) originPatience(repo string) time.Duration {
	if a.isUpstreams(repo) {
		return 0
	}
	return time.Duration(a.cfg.OriginPatience)
}

// isAway reports whether nobody who has the bytes can be reached.
func isAway(err error) bool { return errors.Is(err, registry.ErrUnavailable) }

// bring brings one blob by the best way that works now: swarm, else HTTP from an origin.
func (a *Agent) bring(ctx context.Context, t *try) result {
	p, began := t.p, time.Now()
	if t.suspects != nil {
		return a.overHTTP(ctx, t)
	}
	if size, ok := a.sizes.Get(p.digest); ok && size <= a.smallBlob {
		return a.overHTTP(ctx, t)
	}
	l, err := a.locate(ctx, p)
	switch {
	case errors.Is(err, errNowhere):
		return result{err: err}
	case err != nil:
		a.log.Info("no metainfo, fetching over HTTP", "repository", p.repo, "digest", p.digest, "reason", err)
		return a.overHTTP(ctx, t)
	case l.size() <= a.smallBlob:
		return a.overHTTP(ctx, t)
	}
	if l.arriving != nil {
		err = a.overArriving(ctx, t, l.arriving, l.peers)
	} else {
		err = a.overSwarm(ctx, t, l.metainfo, l.peers)
	}
	if err == nil {
		a.m.duration.Observe(time.Since(began).Seconds())
	}
	return result{err: err}
}

// located is what is known of a blob before its bytes: its metainfo or, where an origin still fetches it, how that can
// be followed.
type located struct {
	metainfo *blob.Metainfo
	arriving *arriving // nil where there is metainfo
	peers    []swarm.Peer
}

// size returns the blob's, in bytes.
func (l located) size() int64 {
	if l.arriving != nil {
		return l.arriving.size
	}
	return l.metainfo.Size
}

// locate asks the tracker for metainfo and peers in one round trip. When the tracker can't say, an owner is asked for
// the metainfo, and the pieces come from origins and from peers that come by.
func (a *Agent) locate(ctx context.Context, p *pull) (l located, err error) {
	known, err := a.store.Metainfo(p.digest)
	if err != nil {
		known = nil // not resumed: nobody has told us the metainfo yet
	}
	tctx, cancel := context.WithTimeout(ctx, trackerBudget)
	defer cancel()
	answer, err := a.announcer.ask(tctx, announce.BlobState{
		Digest: p.digest, Repository: p.repo, Event: announce.EventStarted, Left: announce.LeftUnknown, Want: true, NeedMetainfo: known == nil,
	})
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return l, context.Cause(ctx) // nobody reads it any more: the tracker's silence is not to blame
	default:
		a.m.trackerErrors.Inc()
		a.log.Warn("tracker does not answer, going on without peers", "digest", p.digest, "error", err)
	}
	l.peers = toPeers(answer.Peers)
	if l.metainfo = known; known != nil {
		return l, nil
	}
	if len(answer.Metainfo) > 0 {
		m, err := blob.ParseMetainfo(answer.Metainfo)
		if err == nil && m.Digest == p.digest {
			l.metainfo = m
			return l, nil
		}
		a.log.Warn("tracker sent a wrong metainfo", "digest", p.digest, "error", err)
	}
	l.arriving, l.metainfo, err = a.arrives(ctx, p)
	if errors.Is(err, registry.ErrUnsupported) { // origins of an older version
		l.metainfo, err = a.metainfoFromOrigins(ctx, p)
	}
	return l, err
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
func (a *Agent) overSwarm(ctx context.Context, t *try, m *blob.Metainfo, peers []swarm.Peer) error {
	p := t.p
	var sources []swarm.Source
	for _, o := range a.origins.Owners(p.digest) {
		sources = append(sources, a.leaseFrom(o, p.repo))
	}
	return a.trade(ctx, t, trade{
		Request: swarm.Request{Sources: sources, Peers: peers}, metainfo: m,
		body: func(b *swarmBody) body { return b },
		commit: func(ctx context.Context, part *store.Partial) (*blob.Metainfo, error) {
			_, err := part.Commit(ctx)
			if errors.Is(err, store.ErrDigestMismatch) {
				a.badMetainfo(ctx, p)
			}
			return m, err
		},
	})
}

// leaseFrom returns an origin as a source of pieces of a repository.
func (a *Agent) leaseFrom(o *cluster.Origin, repo string) *leaseSource {
	return &leaseSource{origin: o, repo: repo, peer: a.swarm.PeerID(), bytes: a.m.fromOrigins, swarm: a.swarm, tell: a.tell}
}

// overArriving trades what has come of a blob that an origin still fetches, and leases from that one what nobody has.
func (a *Agent) overArriving(ctx context.Context, t *try, r *arriving, peers []swarm.Peer) error {
	m, err := blob.Provisional(r.digest, r.size, registryOf(r.repo))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	begin := &beginning{}
	wg.Go(func() { begin.read(ctx, r) })
	wg.Go(func() {
		if err := r.follow(ctx); err != nil {
			cancel(fmt.Errorf("%w: %w", registry.ErrUnavailable, err))
		}
	})
	source := &arrivingSource{r: r, name: r.fetcher().ID, lease: func(o *cluster.Origin) *leaseSource {
		l := a.leaseFrom(o, t.p.repo)
		l.only = true
		return l
	}}
	return a.trade(ctx, t, trade{
		Request: swarm.Request{Sources: []swarm.Source{source}, Peers: peers, Hashes: r}, metainfo: m,
		body: func(b *swarmBody) body { return &beginningBody{b, begin} },
		commit: func(ctx context.Context, part *store.Partial) (*blob.Metainfo, error) {
			m, err := r.metainfo()
			if err != nil {
				return nil, err
			}
			if err := begin.agree(part.ReadAt); err != nil {
				return nil, err
			}
			if _, err := part.CommitAs(ctx, m); err != nil {
				return nil, err
			}
			a.swarm.Register(m)
			return m, nil
		},
	})
}

// trade is a try over the swarm.
type trade struct {
	swarm.Request // without Partial
	metainfo      *blob.Metainfo
	body          func(*swarmBody) body
	// commit makes a blob of the pieces, and returns its metainfo.
	commit func(context.Context, *store.Partial) (*blob.Metainfo, error)
}

// trade runs a try over the swarm to its end.
func (a *Agent) trade(ctx context.Context, t *try, x trade) error {
	p, m := t.p, x.metainfo
	part, err := a.partial(ctx, m)
	if err != nil {
		return fmt.Errorf("open partial blob %s: %w", p.digest, err)
	}
	x.Partial = part
	f, err := a.swarm.Fetch(ctx, x.Request)
	if err != nil {
		return errors.Join(fmt.Errorf("swarm %s: %w", p.digest, err), part.Close())
	}
	defer func() {
		if err := f.Close(); err != nil {
			a.log.Warn("fetch did not end well", "digest", p.digest, "error", err)
		}
	}()
	left := func() int64 { return missing(m, part) }
	t.tell(report{m.Size, left, f})
	t.publish(m.Size, x.body(&swarmBody{part: part, fetch: f, m: m}))
	select {
	case <-f.Done():
		err = f.Err()
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	t.tell(report{m.Size, left, nil})
	if err != nil {
		part.Fail(err)
		return fmt.Errorf("swarm %s: %w", p.digest, err)
	}
	whole, err := x.commit(ctx, part)
	if err != nil {
		part.Fail(err)
		return fmt.Errorf("commit %s: %w", p.digest, err)
	}
	a.announcer.completed(p.repo, whole, received(f))
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
		if err := o.VerifyMetainfo(ctx, p.repo, p.digest); err != nil {
			a.log.Warn("origin was not told of a wrong metainfo", "origin", o.ID, "digest", p.digest, "error", err)
		}
	}
	a.sizes.Add(p.digest, 0)
}

// partial opens a partial blob. The pull before may have it yet: it has ended, and its last reader is about to leave.
func (a *Agent) partial(ctx context.Context, m *blob.Metainfo) (*store.Partial, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Duration(a.cfg.Peer.StallTimeout))
	defer cancel()
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		part, err := a.store.Partial(m)
		if !errors.Is(err, store.ErrBusy) {
			return part, err
		}
		select {
		case <-ctx.Done():
			return nil, errors.Join(err, context.Cause(ctx))
		case <-t.C:
		}
	}
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
func (a *Agent) overHTTP(ctx context.Context, t *try) result {
	p := t.p
	r := a.newHTTPSource(ctx, p.repo, p.digest, t.suspects)
	defer r.Close()
	if err := r.open(); err != nil {
		return result{err: err}
	}
	u, err := a.store.NewUpload(store.UploadOptions{
		Size: r.size, Digest: p.digest, Note: p.repo, Transient: true, NoMetainfo: r.size <= a.smallBlob,
	})
	if err != nil {
		return result{err: fmt.Errorf("make room for %s: %w", p.digest, err)}
	}
	t.tell(report{size: r.size, missing: func() int64 { return r.size - u.Offset() }})
	from := &counted{a.swarm.LimitDownload(ctx, p.digest, r), a.m.fromHTTP}
	write := follow
	if r.size <= heldWhole {
		write = hold
	}
	finish, err := write(ctx, t, u, from, r.size)
	if err == nil {
		if r.size > a.smallBlob {
			if m, err := a.store.Metainfo(p.digest); err == nil {
				a.swarm.Register(m)
				a.announcer.completed(p.repo, m, m.Size)
			}
		}
		return result{finish: finish}
	}
	if errors.Is(err, store.ErrDigestMismatch) {
		err = fmt.Errorf("%w: %w", registry.ErrUnavailable, err)
	}
	suspects := r.suspects(err)
	a.tell(p.repo, p.digest, suspects...)
	return result{err: fmt.Errorf("fetch %s over HTTP: %w", p.digest, err), suspects: suspects, finish: func(err error) {
		finish(err)
		if aerr := u.Abort(); aerr != nil && !errors.Is(aerr, store.ErrUploadUnknown) {
			a.log.Warn("session of a failed fetch stays until it expires", "digest", p.digest, "error", aerr)
		}
	}}
}

// follow makes a blob of what it writes to u, with readers behind it until finish is called.
func follow(ctx context.Context, t *try, u *store.Upload, from io.Reader, size int64) (finish func(error), err error) {
	g, err := u.Growth()
	if err != nil {
		return func(error) {}, err
	}
	t.publish(size, followed{g})
	if _, err = u.Write(ctx, 0, from); err == nil {
		_, err = u.Commit(ctx, t.p.digest, nil)
	}
	return g.End, err
}

// hold makes a blob of what it writes to u, and gives readers the bytes once they were verified.
func hold(ctx context.Context, t *try, u *store.Upload, from io.Reader, size int64) (finish func(error), err error) {
	held := bytes.NewBuffer(make([]byte, 0, size))
	if _, err = u.Write(ctx, 0, io.TeeReader(from, held)); err == nil {
		_, err = u.Commit(ctx, t.p.digest, nil)
	}
	if err == nil {
		t.publish(size, heldBody{bytes.NewReader(held.Bytes())})
	}
	return func(error) {}, err
}
