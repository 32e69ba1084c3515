package agent

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"kraken/origin/store"
	"kraken/origin/swarm"
	"kraken/proto/cluster"
	"kraken/proto/registry"
)

var (
	errAbandoned    = errors.New("nobody reads this blob any more")
	errShuttingDown = errors.New("the agent is shutting down")
)

// pullState is where a pull stands.
type pullState int

const (
	begun     pullState = iota // a way to the blob is looked for; readers wait
	joined                     // readers read what comes
	retried                    // origins sent other bytes, and a second try is on its way; readers wait
	abandoned                  // nobody read it: what is under way ends, and nobody can join
	verified                   // the blob is in the cache
	failed                     // it could not be had
)

// pullEvent is what happens to a pull.
type pullEvent int

const (
	published pullEvent = iota // there is a body to read
	deserted                   // the last reader has gone, and less than half is there
	tainted                    // the bytes were others, and somebody else may have the right ones
	committed                  // all was verified, and is in the cache
	broke                      // the try ended otherwise
)

// transitions are all changes of state; what is missing does not happen. A pull is over in verified and failed.
var transitions = map[pullState]map[pullEvent]pullState{
	begun:     {published: joined, deserted: abandoned, tainted: retried, committed: verified, broke: failed},
	joined:    {deserted: abandoned, tainted: retried, committed: verified, broke: failed},
	retried:   {published: joined, deserted: abandoned, committed: verified, broke: failed},
	abandoned: {published: abandoned, committed: verified, broke: failed},
}

func (s pullState) over() bool { return s == verified || s == failed }

// pull brings one blob into the cache, in one try or two, and is shared by all its readers. It belongs to the agent,
// not to the request that began it: own, one goroutine, changes its state, and readers look at it.
type pull struct {
	digest digest.Digest
	repo   string
	caller string // what the runtime that began it has presented, for an upstream's repository of mode caller
	began  time.Time
	ended  chan struct{} // closed when the pull is over
	unread chan struct{} // has a place: the last reader has gone

	mu      sync.Mutex
	state   pullState
	changed store.Signal // the state is another
	err     error        // why it failed
	waiting int          // readers that have joined and have no body yet
	in      *incoming    // what readers get; nil before it was published, and while another try is begun
	report  report
}

// report is how far the try under way is.
type report struct {
	size    int64
	missing func() int64 // bytes; nil: not known
	fetch   *swarm.Fetch // nil: no pieces are swarmed now
}

// incoming is the body of one try, with its readers. It implements store.Growing for who reads it.
type incoming struct {
	p    *pull
	size int64
	body body

	ended chan struct{} // closed when the try has ended
	err   error         // why without the blob; read after ended

	// Under the pull's lock.
	readers int
	over    bool // the try has ended
	closed  bool // the body is
}

// newPull returns a pull that has just begun and has no reader.
func newPull(repo string, d digest.Digest) *pull {
	return &pull{
		digest: d, repo: repo, began: time.Now(), ended: make(chan struct{}), unread: make(chan struct{}, 1),
	}
}

// absence is why a reader found no blob in the cache.
type absence int

const (
	notCached  absence = iota // it was not there
	unreadable                // it could not be opened
)

// errOtherRegistry says that a blob is being pulled from another registry than the one that a reader names.
var errOtherRegistry = errors.New("the blob is on its way from another registry")

// join returns the pull of d, begun now if there is none, with one reader more, who must call body once. Where none can
// be joined, wait is closed when to look into the cache again: at the end of one that is abandoned, or at once when the
// cache has what it lacked as the caller looked. errOtherRegistry where what comes is another registry's: until all was
// verified it is no business of this reader, because that one may send other bytes, slowly.
func (a *Agent) join(ctx context.Context, repo string, d digest.Digest, why absence) (p *pull, wait <-chan struct{}, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if p := a.pulls[d]; p != nil {
		if registryOf(p.repo) != registryOf(repo) {
			return nil, nil, errOtherRegistry
		}
		if !p.join() {
			return nil, p.ended, nil
		}
		return p, nil, nil
	}
	if a.closing {
		return nil, nil, fmt.Errorf("%w: %w", registry.ErrUnavailable, errShuttingDown)
	}
	if _, err := a.store.Stat(d); err == nil && why == notCached {
		return nil, closedChan, nil
	}
	p = newPull(repo, d)
	p.caller = cluster.Authorization(ctx)
	p.join()
	a.pulls[d] = p
	a.wg.Go(func() { a.own(p) })
	return p, nil, nil
}

// registryOf returns the host of the registry that a repository is mirrored from, empty for the cluster's own.
func registryOf(repo string) string {
	host, _, _ := cluster.SplitUpstream(repo)
	return host
}

// closedChan is closed from the start.
var closedChan = func() <-chan struct{} {
	c := make(chan struct{})
	close(c)
	return c
}()

// own brings the blob, and is the one that changes the pull's state.
func (a *Agent) own(p *pull) {
	if suspects := a.attempt(p, nil); suspects != nil {
		a.attempt(p, suspects)
	}
}

// attempt runs one try to its end: the first one without suspects, else one that goes around them. It returns new
// suspects when another try is to follow: who has read wrong bytes can't be helped, but who still waits, and the next
// reader, get the right ones.
func (a *Agent) attempt(p *pull, suspects []string) []string {
	ctx, cancel := context.WithCancelCause(cluster.WithAuthorization(a.ctx, p.caller))
	defer cancel(nil)
	t := &try{p: p, suspects: suspects, readable: make(chan *incoming, 1)}
	results := make(chan result, 1)
	go func() { results <- a.run(ctx, t) }()
	for {
		select {
		case in := <-t.readable:
			p.publish(in)
		case <-p.unread:
			if p.abandon() {
				cancel(errAbandoned)
			}
		case r := <-results:
			select {
			case in := <-t.readable:
				p.publish(in)
			default:
			}
			return a.conclude(p, suspects == nil, r)
		}
	}
}

// conclude ends a try with what came of it. It returns suspects when another try is to follow.
func (a *Agent) conclude(p *pull, first bool, r result) (suspects []string) {
	if errors.Is(r.err, store.ErrFull) {
		r.err = fmt.Errorf("%w: %w", registry.ErrStorageFull, r.err)
	}
	event := committed
	a.mu.Lock()
	switch {
	case r.err == nil:
	case first && len(r.suspects) > 0 && !a.closing && p.can(tainted) && len(a.originsBut(p.digest, r.suspects)) > 0:
		event, suspects = tainted, r.suspects
	default:
		event = broke
	}
	if event != tainted {
		delete(a.pulls, p.digest)
	}
	a.mu.Unlock()
	a.note(p, r.err)
	p.end(event, r)
	if event == broke {
		a.announcer.gone(p.digest)
	}
	return suspects
}

// note logs and counts what ended without the blob, by whose fault it was.
func (a *Agent) note(p *pull, err error) {
	switch {
	case err == nil:
		a.noteRoom(nil)
	case errors.Is(err, errAbandoned):
	case errors.Is(err, store.ErrFull):
		a.noteRoom(err)
		a.log.Info("a blob is not cached for want of room: its readers get it from the origins", "repository", p.repo, "digest", p.digest, "error", err)
	case isUncached(err):
		a.log.Info("a blob is not cached: its readers get it from the origins", "repository", p.repo, "digest", p.digest, "error", err)
	case errors.Is(err, registry.ErrBlobUnknown): // whoever asks for what there is not makes no failure of it
		a.log.Info("no origin knows a blob that was asked for", "repository", p.repo, "digest", p.digest)
	case a.ctx.Err() != nil:
		a.log.Info("the agent ends before a pull does", "repository", p.repo, "digest", p.digest)
	default:
		a.m.failed.Inc()
		a.log.Warn("pull failed", "repository", p.repo, "digest", p.digest, "error", err)
	}
}

// The owner's.

// enter changes the state, where the table has the event for it, and wakes who waits. The caller holds p.mu.
func (p *pull) enter(e pullEvent) bool {
	next, ok := transitions[p.state][e]
	if !ok {
		return false
	}
	p.state = next
	p.changed.Wake()
	return true
}

// can reports whether e may happen now.
func (p *pull) can(e pullEvent) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, ok := transitions[p.state][e]
	return ok
}

// publish gives readers a body.
func (p *pull) publish(in *incoming) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.in = in
	p.enter(published)
}

// abandon reports whether the pull is given up: nobody reads it, and less than half is there, as far as is known. Of
// what is mostly there the rest is fetched for the next reader and for the swarm. What was fetched stays on disk either
// way, and the next pull resumes.
func (p *pull) abandon() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.isRead() {
		return false // somebody has joined meanwhile
	}
	if r := p.report; r.missing != nil && r.missing() <= r.size/2 {
		return false
	}
	return p.enter(deserted)
}

// end changes the state with the result of a try, and then tells its readers: one that comes back at once finds the
// second try.
func (p *pull) end(e pullEvent, r result) {
	p.mu.Lock()
	in := p.in
	if p.report = (report{}); e == tainted {
		p.in = nil
	} else {
		p.err = r.err
	}
	p.enter(e)
	over := p.state.over()
	p.mu.Unlock()
	if in != nil {
		in.err = r.err
		close(in.ended)
	}
	if r.finish != nil {
		r.finish(r.err)
	}
	if over {
		close(p.ended)
	}
	if in != nil {
		p.mu.Lock()
		in.over = true
		p.mu.Unlock()
		p.tidy(in)
	}
}

// The readers'.

// isRead reports whether somebody reads the pull or waits for it. The caller holds p.mu.
func (p *pull) isRead() bool { return p.waiting > 0 || p.in != nil && p.in.readers > 0 }

// join adds a reader, unless the pull is abandoned or over.
func (p *pull) join() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state == abandoned || p.state.over() {
		return false
	}
	p.waiting++
	return true
}

// body waits until there is something to read, for a reader that has joined. It returns nil and no error when the blob
// is in the cache instead. leave must be called once on what it returns.
func (p *pull) body(ctx context.Context) (*incoming, error) {
	for {
		changed := p.changed.C()
		p.mu.Lock()
		state, in, err := p.state, p.in, p.err
		if in != nil && (state == joined || state == verified) {
			p.waiting--
			in.readers++
			p.mu.Unlock()
			return in, nil
		}
		p.mu.Unlock()
		if state.over() {
			p.goAway()
			return nil, err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			p.goAway()
			return nil, context.Cause(ctx)
		}
	}
}

// goAway takes off a reader that has no body.
func (p *pull) goAway() {
	p.mu.Lock()
	p.waiting--
	in := p.in
	p.mu.Unlock()
	p.gone(in)
}

// leave takes one reader off.
func (in *incoming) leave() {
	in.p.mu.Lock()
	in.readers--
	in.p.mu.Unlock()
	in.p.gone(in)
}

// gone tells the owner when nobody reads the pull any more, and closes the body that the one who has gone was the last
// to need.
func (p *pull) gone(in *incoming) {
	p.mu.Lock()
	deserted := in == p.in && !p.isRead() // a second try goes on for the next reader
	p.mu.Unlock()
	if deserted {
		select {
		case p.unread <- struct{}{}:
		default:
		}
	}
	if in != nil {
		p.tidy(in)
	}
}

// tidy closes a body whose try has ended and that nobody reads or is about to.
func (p *pull) tidy(in *incoming) {
	p.mu.Lock()
	needed := !in.over || in.readers > 0 || in == p.in && p.waiting > 0
	last := !needed && !in.closed
	in.closed = in.closed || last
	p.mu.Unlock()
	if last {
		in.body.close()
	}
}

// ReadAt implements store.Growing.
func (in *incoming) ReadAt(b []byte, off int64) (int, error) { return in.body.ReadAt(b, off) }

// Wait implements store.Growing.
func (in *incoming) Wait(ctx context.Context, off int64) (int64, error) {
	return in.body.wait(ctx, off)
}

// Verified implements store.Growing.
func (in *incoming) Verified(ctx context.Context) error {
	select {
	case <-in.ended:
		return in.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
